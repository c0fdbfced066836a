"""The targets: the runtimes and CPUs that a file can be made for, as data.

A new target is one more value in `TARGETS`.

The facts of `onnxruntime-cpu` are measured (docs/runtime.md): integer Conv and Gemm exist for 8-bit
operands only, so narrower weights are stored packed and run at 8 bits, and 16-bit layers are stored
in 16 bits and run in float.

`onnxruntime-cpu-avx2` is the same on an x86 CPU without VNNI instructions. There the kernel adds
two products u8 x s8 in 16 bits, saturating: `2 * 255 * 127` does not fit, `2 * 255 * 64` does, so
8-bit weights take 7 bits of their type.

`onnxruntime-arm64` and `onnxruntime-wasm` run the same operators on integers; single kernels round
otherwise there (`mpq.export.arithmetic`). `openvino-cpu` has an arithmetic of its own, and decodes
packed bytes in float, so it runs 4-bit weights as integers where they are stored as INT4
(docs/portability.md). Several targets together are one whose every answer holds on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from mpq.cpu import Cpu, this_cpu
from mpq.errors import PolicyError, nearest
from mpq.target import Target

Part = TypeVar("Part")

ONNXRUNTIME_CPU = Target(
    name="onnxruntime-cpu",
    integer_ops=frozenset(
        {"add", "mul", "concat", "avgpool", "global_avgpool", "sigmoid", "hardsigmoid"}
    ),
    dynamic=frozenset({"linear"}),
    writes_floats=frozenset({"linear"}),
    # All but 8 bits have an entry in the policy; packed layers are split from what is unpacked.
    bytes_per_layer={16: 66, 8: 175, 4: 237, **dict.fromkeys((7, 6, 5, 3, 2), 250)},
    bytes_per_width={7: 1370, 6: 674, 5: 985, 3: 1141, 2: 444},
    bytes_per_file=700,
    about="x86 CPUs with VNNI",
)

ONNXRUNTIME_AVX2 = replace(
    ONNXRUNTIME_CPU,
    name="onnxruntime-cpu-avx2",
    short="avx2",
    about="x86 CPUs without VNNI",
    saturates=True,
)
ONNXRUNTIME_ARM64 = replace(
    ONNXRUNTIME_CPU,
    name="onnxruntime-arm64",
    short="arm64",
    about="64-bit ARM: phones, Raspberry Pi, Apple, servers",
    arithmetic="arm64",
)
ONNXRUNTIME_WASM = replace(
    ONNXRUNTIME_CPU,
    name="onnxruntime-wasm",
    short="wasm",
    about="browsers and node, by onnxruntime-web",
    needs="onnxruntime-web 1.30",
    arithmetic="wasm",
)
OPENVINO_CPU = replace(
    ONNXRUNTIME_CPU,
    name="openvino-cpu",
    short="openvino",
    about="OpenVINO on x86 CPUs",
    widths=(4, 8, 16),
    dynamic=frozenset(),
    needs="openvino 2026.4",
    int4_formats=frozenset({"cast"}),
    arithmetic=None,
)

TARGETS = {
    target.name: target
    for target in (
        ONNXRUNTIME_CPU,
        ONNXRUNTIME_AVX2,
        ONNXRUNTIME_ARM64,
        ONNXRUNTIME_WASM,
        OPENVINO_CPU,
    )
}


def this_target(cpu: Cpu | None = None) -> Target:
    """The target that this computer is, or one of that CPU."""
    cpu = cpu or this_cpu()
    if cpu.arm64:
        return ONNXRUNTIME_ARM64
    return ONNXRUNTIME_AVX2 if cpu.saturates else ONNXRUNTIME_CPU


def each(target: Target) -> tuple[Target, ...]:
    """The targets that one stands for: its members, or itself."""
    return tuple(TARGETS[name] for name in target.members) or (target,)


def get_target(names: str | None) -> Target:
    """The target of that name, or several as one (`arm64,wasm`); None: that of this computer.

    Raises:
        PolicyError: an unknown name, or targets that no file can serve together.
    """
    if names is None:
        return this_target()
    found = {_named(name.strip()).name for name in names.split(",")}
    return together([target for name, target in TARGETS.items() if name in found])


def together(targets: Sequence[Target]) -> Target:
    """One target that asks of a file what all of these ask.

    Raises:
        PolicyError: two of them have no width, or no storage of 4-bit weights, in common.
    """
    if len(targets) == 1:
        return targets[0]
    first = targets[0]
    return replace(
        first,
        name=",".join(t.name for t in targets),
        members=tuple(t.name for t in targets),
        about=" and ".join(t.about for t in targets),
        needs="; ".join(dict.fromkeys(t.needs for t in targets)),
        short="",
        integer_ops=frozenset.intersection(*(t.integer_ops for t in targets)),
        moving_ops=frozenset.intersection(*(t.moving_ops for t in targets)),
        integer_bits=min(t.integer_bits for t in targets),
        widths=_common(targets, "width", lambda t: t.widths),
        gaps=tuple(dict.fromkeys(gap for t in targets for gap in t.gaps)),
        dynamic=frozenset.intersection(*(t.dynamic for t in targets)),
        writes_floats=frozenset.intersection(*(t.writes_floats for t in targets)),
        saturates=any(t.saturates for t in targets),
        int4_formats=frozenset(
            _common(targets, "storage of 4-bit weights", lambda t: sorted(t.int4_formats))
        ),
        arithmetic=first.arithmetic if len({t.arithmetic for t in targets}) == 1 else None,
    )


def _common(
    targets: Sequence[Target], what: str, of: Callable[[Target], Iterable[Part]]
) -> tuple[Part, ...]:
    """What all have, in the order of the first; the pair that has nothing is named."""
    for i, one in enumerate(targets):
        for other in targets[:i]:
            if set(of(one)).isdisjoint(of(other)):
                lists = (f"{t.name}: {', '.join(map(str, of(t)))}" for t in (other, one))
                raise PolicyError(f"targets must have a {what} in common. Got {'; '.join(lists)}.")
    return tuple(x for x in of(targets[0]) if all(x in set(of(t)) for t in targets))


def _named(name: str) -> Target:
    known = {t.short or t.name: t for t in TARGETS.values()} | TARGETS
    if name not in known:
        raise PolicyError(
            f"target must be one of {', '.join(TARGETS)}, or several with commas between. "
            f"Got {name!r}{nearest(name, known)}"
        )
    return known[name]
