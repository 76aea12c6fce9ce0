"""What the tests of conversion and of its verification share."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvtool.checkpoint import Checkpoint, sha256_file
from kvtool.convert import conversion, planning
from kvtool.runtime import Engine

MANIFEST = "kvtool_manifest.json"
PROBE = "kvtool/probe.safetensors"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def one_thread() -> Iterator[None]:
    """Body of a fixture: models this small are slower with more, and bits depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # verification collects garbage; most of that time would go into old objects
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def convert(model: Path | str, output: Path, **options: Any) -> conversion.ConversionResult:
    """Converts with little calibration text; `report`, `resume` and `overwrite` go to the run."""
    run = {name: options.pop(name) for name in ("report", "resume", "overwrite") if name in options}
    if options.get("method") != "exact":
        options = {"tokens": 1024} | options
    return conversion.convert(
        Checkpoint.open(str(model)), output, planning.ConvertOptions(**options), **run
    )


def plan(model: Path | str, **options: Any) -> dict[str, Any]:
    return planning.plan(Checkpoint.open(str(model)), planning.ConvertOptions(**options))


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, from every shard."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in read(file)}


def read(file: Path) -> list[tuple[str, Tensor]]:
    return list(load_file(file).items())


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Rewrites `model.safetensors` after `change` edited its tensors, under true hashes."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata)
    return rehash(folder)


def edit_json(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Rewrites a JSON file after `change` edited it, under true hashes."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return rehash(folder)


def rehash(folder: Path) -> Path:
    """Makes a converted folder's manifest vouch for the files as they are now."""
    if (folder / MANIFEST).is_file():
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in manifest["sha256"]:
            if (folder / name).is_file():
                manifest["sha256"][name] = sha256_file(folder / name)
        (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def edited_copy(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    return edit(Path(shutil.copytree(model, folder)), change)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder as stock transformers loads it; no weight is missing, left over or misshapen."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


def vllm_epsilon(model: Any) -> Any:
    """vLLM's convention: the latent norms, too, take the config's epsilon."""
    for name, module in model.named_modules():
        if name.endswith(("kv_a_layernorm", "q_a_layernorm")):
            module.variance_epsilon = model.config.rms_norm_eps
    return model


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(ids[None], use_cache=False).logits[0].float()
    return result


@torch.inference_mode()
def greedy(model: Any, prompt: Tensor, count: int = 64) -> list[int]:
    """`count` tokens by transformers' own `generate`, past any end of text."""
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompt[None])
    text = model.generate(
        prompt[None], attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return text[0, len(prompt) :].tolist()


def engine(folder: Path) -> Engine:
    return Engine.load(Checkpoint.open(str(folder)))


def engine_logits(loaded: Engine, ids: Tensor) -> Tensor:
    return loaded.extend(loaded.new_cache(1, len(ids)), ids, all_logits=True)


def engine_greedy(loaded: Engine, prompt: Tensor, count: int = 64) -> list[int | None]:
    steps = loaded.generate([prompt.tolist()], max_new_tokens=count, ignore_eos=True)
    return [tokens[0] for tokens in steps]


def mean_kl(reference: Tensor, other: Tensor) -> float:
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def random_ids(count: int = 200, vocabulary: int = 300, seed: int = 0) -> Tensor:
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def digests(folder: Path) -> dict[str, str]:
    """Hashes of all files but the manifest, which tells the time."""
    return {
        str(file.relative_to(folder)): sha256_file(file)
        for file in folder.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }
