"""16-bit layers in two forms, as a policy writes them: the activation format says which.

`fast` (`int16/tensor`): float arithmetic on weights that are stored in 16 bits, activations as they
come. `exact` (`uint16/tensor`): the same, and each input is rounded to 16 bits when it runs. The
form is a matter of the policy and not of the export, because rounding needs ranges, which are
calibrated, and because training and simulation must round as the file does.
"""

from __future__ import annotations

from typing import Literal, get_args

from mpq.fields import Spec
from mpq.policy import DefaultSpec, LayerPolicy, Policy
from mpq.spec import ROUNDED_16, activation_spec

Int16Form = Literal["fast", "exact"]
INT16_FORMS: tuple[str, ...] = get_args(Int16Form)


def take_form(policy: Policy, form: Int16Form) -> Policy:
    """The policy with all its 16-bit activations in one form; other widths stay."""
    wide = ROUNDED_16 if form == "exact" else activation_spec(16)

    def formed(spec: Spec) -> Spec:
        return spec if spec == "float" or spec.bits < 16 else wide

    def entry(layer: LayerPolicy) -> LayerPolicy:
        taken = None if layer.activation is None else formed(layer.activation)
        return layer.replace(activation=taken)

    default = DefaultSpec(
        weight=policy.default.weight, activation=formed(policy.default.activation)
    )
    return policy.replace(default=default, layers=[entry(layer) for layer in policy.layers])
