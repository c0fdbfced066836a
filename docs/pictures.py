"""Draw the pictures of `how.md`: `python docs/pictures.py` writes `pictures/*.svg`.

They are light or dark as the reader's system is; on the site, as the page is (`site.css`, which
has the same classes). The one of scores and widths is drawn from a policy of `benchmarks/results`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from mpq.policy import Policy

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "benchmarks" / "results" / "cifar10-resnet20" / "files"
POLICY = KEPT / "public-8-4-s0.yaml"
STYLE = """<style>
svg { --fg: #1f2328; --dim: #59636e; --line: #afb8c1; --int: #2f9e44; --flt: #e8590c;
  --mark: #4263eb; }
@media (prefers-color-scheme: dark) {
  svg { --fg: #e6edf3; --dim: #9198a1; --line: #59636e; --int: #51cf66; --flt: #ff922b;
    --mark: #91a7ff; } }
text { fill: var(--fg); font: 14px system-ui, sans-serif; }
.s { fill: var(--dim); font-size: 12px; }
.b { font-weight: 600; }
.m { font-family: ui-monospace, monospace; font-size: 12.5px; }
.c { text-anchor: middle; }
.r { text-anchor: end; }
.box { fill: none; stroke: var(--line); stroke-width: 1.5; }
.int { stroke: var(--int); }
.flt { stroke: var(--flt); }
.hi { stroke: var(--mark); }
.barint { fill: var(--int); }
.barflt { fill: var(--flt); }
.barmark { fill: var(--mark); }
.a { fill: none; stroke: var(--dim); stroke-width: 1.5; }
.head { fill: var(--dim); }
</style>
"""


def text(x: float, y: float, said: str, kind: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(said)}</text>'


def box(x: float, y: float, wide: float, lines: tuple[str, ...], kind: str = "") -> str:
    """A box 50 high with a title, and a smaller line under it."""
    title, *rest = lines
    drawn = f'<rect x="{x:g}" y="{y:g}" width="{wide:g}" height="50" rx="8" class="box {kind}"/>'
    middle = x + wide / 2
    shown = [text(middle, y + (22 if rest else 30), title, "b c")]
    shown += [text(middle, y + 40, line, "s c") for line in rest]
    return drawn + "".join(shown)


def bar(x: float, y: float, wide: float, kind: str) -> str:
    """A bar beside a line of text."""
    return f'<rect x="{x:g}" y="{y - 11:g}" width="{wide:.1f}" height="13" rx="2" class="{kind}"/>'


def arrow(x: float, y: float, to: float, said: str = "", kind: str = "m c") -> str:
    """An arrow to the right, with what it is called above it."""
    line = f'<path d="M{x:g} {y:g}H{to - 7:g}" class="a"/>'
    tip = f'<path d="M{to:g} {y:g}l-9 -5v10z" class="head"/>'
    return line + tip + (text((x + to) / 2, y - 8, said, kind) if said else "")


def svg(wide: int, high: int, title: str, *parts: str) -> str:
    """A whole picture."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img">'
    return "\n".join(
        [head, f"<title>{escape(title)}</title>", STYLE + parts[0], *parts[1:], "</svg>\n"]
    )


def pipeline() -> str:
    """From a checkpoint to a proof, with the commands."""
    row, second = 40, 150
    return svg(
        880, 230, "From a checkpoint to a proven file",
        box(10, row, 130, ("checkpoint", "trained, float")),
        arrow(140, row + 25, 210, "capture", "s c"),
        box(210, row, 130, ("graph, float", "batch norm folded")),
        arrow(340, row + 25, 440, "score", "s c"),
        box(440, row, 130, ("scores", "layer x width"), "hi"),
        arrow(570, row + 25, 700, "search", "s c"),
        text(635, row + 44, "your budget", "s c"),
        box(700, row, 160, ("policy.yaml", "read it, edit it"), "hi"),
        text(500, row - 14, "mpq analyze", "m c"),
        f'<path d="M780 {row + 50}v26H85v{second - row - 83}" class="a"/>',
        f'<path d="M85 {second}l-5 -9h10z" class="head"/>',
        box(10, second, 150, ("graph, prepared", "fake quantizers")),
        arrow(160, second + 25, 330, "mpq ptq | mpq qat"),
        text(245, second + 44, "images | teachers", "s c"),
        box(330, second, 140, ("graph, frozen", "integers")),
        arrow(470, second + 25, 590, "mpq export"),
        box(590, second, 110, ("model.onnx", "one file"), "int"),
        arrow(700, second + 25, 740),
        box(740, second, 130, ("proofs", "read back"), "int"),
    )  # fmt: skip


def scores() -> str:
    """What each layer would cost at 4 bits, what it weighs, and what the search made of it."""
    evidence = Policy.load(POLICY).evidence
    widths = Policy.load(POLICY).choices(list(evidence))
    lost = {name: one["score"]["4"] for name, one in evidence.items()}
    weights = {name: one["params"] for name, one in evidence.items()}
    parts = [
        text(20, 24, "layer", "s"),
        text(150, 24, "expected loss at 4 bits", "s"),
        text(450, 24, "share of the weights", "s"),
        text(720, 24, "the search takes", "s"),
    ]
    for i, name in enumerate(evidence):
        y = 46 + 20 * i
        bits = widths[name].weight_bits
        kind = "barint" if bits == 4 else "barmark"
        share, weight = lost[name] / sum(lost.values()), weights[name] / sum(weights.values())
        parts += [
            text(20, y, name, "m"),
            bar(150, y, 1800 * share, "barflt"),
            bar(450, y, 1500 * weight, "head"),
            bar(720, y, 12 * bits, kind),
            text(720 + 12 * bits + 8, y, f"{bits} bits", "s"),
        ]
    return svg(880, 60 + 20 * len(evidence), "Scores and widths of ResNet-20", *parts)


def lowering() -> str:
    """One layer in the simulation, in the file and in the runtime."""
    y = (34, 134, 254)
    return svg(
        880, 320, "One 4-bit layer: simulated, stored, executed",
        text(10, y[0] + 30, "trained", "b"), text(10, y[0] + 46, "PyTorch, float", "s"),
        box(150, y[0], 120, ("fake quantize", "x: uint8"), "flt"),
        arrow(270, y[0] + 25, 320),
        box(320, y[0], 190, ("Conv, ReLU", "w on the int4 grid"), "flt"),
        arrow(510, y[0] + 25, 560),
        box(560, y[0], 120, ("fake quantize", "y: uint8"), "flt"),
        text(10, y[1] + 50, "stored", "b"), text(10, y[1] + 66, "model.onnx", "s"),
        box(150, y[1], 150, ("QuantizeLinear", "DequantizeLinear")),
        arrow(300, y[1] + 25, 560),
        box(560, y[1], 120, ("Conv, Relu", "float by its type"), "flt"),
        arrow(680, y[1] + 25, 720),
        box(720, y[1], 150, ("QuantizeLinear", "DequantizeLinear")),
        box(150, y[1] + 56, 90, ("INT4", "two a byte"), "int"),
        arrow(240, y[1] + 81, 275), box(275, y[1] + 56, 100, ("Cast", "to INT8"), "int"),
        arrow(375, y[1] + 81, 410),
        box(410, y[1] + 56, 150, ("DequantizeLinear", "a scale a channel")),
        f'<path d="M560 {y[1] + 81}H620v-24" class="a"/>',
        f'<path d="M620 {y[1] + 50}l-5 9h10z" class="head"/>',
        text(10, y[2] + 24, "executed", "b"), text(10, y[2] + 40, "onnxruntime", "s"),
        text(150, y[2] + 30, "uint8", "m"), arrow(195, y[2] + 25, 320),
        box(320, y[2], 190, ("QLinearConv", "int8 x uint8, int32 sums"), "int"),
        arrow(510, y[2] + 25, 560), text(568, y[2] + 30, "uint8", "m"),
        text(630, y[2] + 20, "Cast folded at load, Q and DQ fused,", "s"),
        text(630, y[2] + 36, "ReLU is the saturation at zero", "s"),
    )  # fmt: skip


def proof() -> str:
    """Who answers, and what is held against what."""
    return svg(
        880, 300, "Four answers, and what is held against what",
        box(10, 30, 210, ("simulation", "PyTorch, as it was trained"), "flt"),
        box(330, 30, 220, ("onnxruntime, unoptimized", "every tensor of the file"), "int"),
        box(660, 30, 210, ("onnxruntime, defaults", "what your users run"), "int"),
        arrow(220, 55, 330, "verify", "m c"), arrow(550, 55, 660, "verify", "m c"),
        text(275, 78, "class, each", "s c"), text(275, 93, "quantizer alone", "s c"),
        text(605, 78, "class, each", "s c"), text(605, 93, "quantizer alone", "s c"),
        box(330, 210, 220, ("integer reference", "numpy, from the file alone"), "hi"),
        '<path d="M440 210V87" class="a"/>', '<path d="M440 80l-5 9h10z" class="head"/>',
        text(450, 150, "verify --exact", "m"),
        text(450, 167, "every integer tensor, bit for bit", "s"),
        box(660, 210, 210, ("certificate", "asked, stored, executed, why"), "hi"),
        '<path d="M765 80V203" class="a"/>', '<path d="M765 210l-5 -9h10z" class="head"/>',
        text(775, 150, "certify", "m"), text(775, 167, "its own graph", "s"),
        text(10, 226, "a failed comparison", "s"), text(10, 242, "is a failed export:", "s"),
        text(10, 258, "no file is written", "s"),
    )  # fmt: skip


if __name__ == "__main__":
    for draw in (pipeline, scores, lowering, proof):
        (HERE / "pictures" / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")
