"""What a model's `generation_config.json` says of how to draw, for requests that do not say it."""

from __future__ import annotations

from pydantic import ValidationError

from kvtool._tensors import read_json
from kvtool.checkpoint import Checkpoint
from kvtool.errors import CheckpointError
from kvtool.server.schema import IN_CONFIG, Generation, said_in_config

FILE = "generation_config.json"

_HINT = "correct it, or let requests alone say how to draw: --generation-config none"

# What else changes what transformers draws or where it ends: no default of requests here, nor in
# vLLM. It changes nothing where it is 0 or empty, and a factor where it is 1.
_FACTORS = ("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p")
_BEYOND = (
    *_FACTORS,
    *("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "top_h", "watermarking_config"),
    *("max_length", "max_time", "min_length", "min_new_tokens", "stop_strings"),
    *("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "suppress_tokens"),
    *("encoder_no_repeat_ngram_size", "no_repeat_ngram_size"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
)


def defaults_of(checkpoint: Checkpoint) -> tuple[Generation | None, list[str]]:
    """What requests to a model say that do not say it themselves, and the fields of its file that
    are not followed.

    Raises:
        CheckpointError: The file is damaged, or says what no request may.
    """
    file = checkpoint.path / FILE
    if not file.is_file():
        return None, []
    config = read_json(file)
    try:
        defaults = Generation.model_validate(said_in_config(config))
    except ValidationError as error:
        wrong = error.errors()[0]
        field = next(name for name, ours in IN_CONFIG.items() if ours == wrong["loc"][0])
        # With another length than a number of tokens, transformers does not load the model.
        hint = None if field == "max_new_tokens" else _HINT
        raise CheckpointError(f"{file}: {field}: {wrong['msg']}", hint=hint) from error
    beyond = [name for name in _BEYOND if config.get(name)]
    return defaults, [x for x in beyond if not (x in _FACTORS and config[x] == 1)]
