"""The model card of a small vision-language model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from apt.grounding.scenes import SetDescription
from data_utils.files import write_text


def write_card(
    folder: Path, settings: dict, description: SetDescription, scenes: int, judged: dict[str, float], seconds: float
) -> None:
    """Write ``README.md`` into the model's folder.

    Args:
        settings: of the run; judged: what held-out scenes said at its end; seconds: it took.
    """
    bins = settings["sizes"]["bins"]
    rows = "\n".join(f"| `{name}` | {value:.3f} |" for name, value in judged.items())
    write_text(
        folder / "README.md",
        f"""---
license: mit
library_name: transformers
---

# A small Qwen3-VL that points

Qwen3-VL's own classes (`Qwen3VLForConditionalGeneration`) with few parameters. {scenes} rendered scenes taught it
to say where named things are and what lies where. For action experts that read its features; it knows the words of its
scenes and no others. Cameras: {", ".join(description.cameras)}, {description.image_size} pixels each.

On scenes that it has not seen:

| | |
|---|---|
{rows}

`point_u`, `point_v`: share of names at whose last token the last layer points to within one of {bins} places, along the
image's width and height, `point_CAMERA`: along both, in this camera's; `look_CAMERA`: share of its attention that the
head which looks at that camera gives the right cell of the picture; `see_CAMERA`: share of the things in its picture
that the vision tower's tokens name; `point_error`: median distance, as a share of the
image; `word_u`, `word_v`: as `point_`, of places that it says in words; `text`: share of the other tokens of its
answers that are right.

Sentences: {"; ".join(description.sentences)}.

Trained in {seconds / 60:.0f} minutes with torch {torch.__version__}, transformers {transformers.__version__}:

```json
{json.dumps(settings, indent=1)}
```
""",
    )
