"""What torch.compile needs to know about policies: one graph for each shape, and few shapes."""

from __future__ import annotations

PROMPT_BUCKET = 32
"""Where something is compiled, prompts are padded to a multiple of this many tokens, so that a new one finds its shape
compiled."""

_MOST_VARIANTS = 64  # prompt lengths x numbers of samples that may be compiled


def pad_multiple(compiled: bool) -> int:
    """Prompt lengths are rounded up to a multiple of this."""
    return PROMPT_BUCKET if compiled else 1


def allow_variants() -> None:
    """Let this process compile a function for more shapes than torch's few, after which it goes on uncompiled."""
    import torch._dynamo  # slow to import

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _MOST_VARIANTS)
