"""One new query per sequence against cached latents, in absorbed form."""

from kvtool.kernels.latent_attention.reference import latent_decode_attention

__all__ = ["latent_decode_attention"]
