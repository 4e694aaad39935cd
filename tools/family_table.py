"""The README's table of model families, from the rows of `host/families.py` and the tiny models that the tests run on.

python tools/family_table.py            prints it
python tools/family_table.py --write    puts it into README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # after the host, whose `server` is another
from pack import ROOT, load_pack

if __name__ == "__main__":
    load_pack()

import torch

README = ROOT / "README.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
KNOWN_AS = {  # what users call the models of a tiny family
    "UNet3D": "UNet3D: Zeroscope, ModelScope, the embedded tiny model",
    "LaVie": "LaVie (base)",
    "SD 1.5": "SD 1.5, frames as a batch",
    "SD 1.5, inflated": "SD 1.5 with *Inflate Attention to Video*",
    "AnimateDiff": "AnimateDiff on SD 1.5, by AnimateDiff-Evolved",
    "CogVideoX 1.0": "CogVideoX 5B",
    "CogVideoX 1.5": "CogVideoX 1.5 5B",
    "Wan": "Wan 2.1 and 2.2, text to video",
    "Wan image to video": "Wan, image to video",
    "Wan with pictures behind the clip (Bernini)": "Wan 2.2 with *Bernini Conditioning* (Bernini-R)",
    "HunyuanVideo 1.5": "HunyuanVideo 1.5, text and image to video",
    "LTX-2": "LTX-2 and 2.3 (2.5 by its class): the picture, not the sound",
}
SHOW1 = (
    "| Show-1, key frames in pixels | no: one attention reads prompt and frame together | no, for the same reason "
    "| u | any number, one image in pixels each |"
)
HEAD = "| model | STR-Match looks at | ST-Layout acts in | DreamMotion compares keys in | frames of a clip |"


def table() -> str:
    """Markdown: one row a family, then Show-1's, which has tests of its own."""
    from spacetime_edit.tests.host.tiny_families import FAMILIES

    with torch.inference_mode():
        rows = [_row(family) for family in FAMILIES if "itself" not in family.name]
    return "\n".join([HEAD, "|---" * 5 + "|", *rows, SHOW1])


def _row(tiny) -> str:
    from spacetime_edit.host.families import family_of
    from spacetime_edit.host.features import key_blocks
    from spacetime_edit.host.layers import attention_layers
    from spacetime_edit.host.relevance_matching import lacks_for_relevance

    model = tiny.model()
    family, kinds = family_of(model), {layer.kind for layer in attention_layers(model).values()}
    lacking = lacks_for_relevance(model)
    matched = f"no: no {lacking}" if lacking else family.score_blocks or "all but the finest grid"
    acts = {"spatial": "self", "spacetime": "self", "cross": "cross", "joint": "joint", "temporal": "(temporal)"}
    regions = ", ".join(name for kind, name in acts.items() if kind in kinds)
    letters = sorted({block[0] for block in key_blocks(model)})
    compared = ", ".join(letters) if family.patched is None else f"the later half of {', '.join(letters)}"
    step, least = family.frames.step, family.frames.shortest
    frames = "any number, one latent image each" if step == 1 else f"{step} n + {least}, one video latent"
    return f"| {KNOWN_AS.get(tiny.name, tiny.name)} | {matched} | {regions} | {compared} | {frames} |"


def main() -> int:
    made = f"{BEGIN}\n{table()}\n{END}"
    if "--write" in sys.argv[1:]:
        text = README.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        README.write_text(before + made + rest.partition(END)[2], encoding="utf-8")
    else:
        sys.stdout.write(made + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
