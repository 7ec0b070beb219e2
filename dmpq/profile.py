"""What is known of each expert before a search: use, sensitivity, error, weight statistics.

A profile is measured once (:mod:`dmpq.profiling`), saved as one safetensors file, and searched
anywhere: it holds no weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.files import replace_atomically
from dmpq.formats import Menu
from dmpq.spec import ModelSpec

Floats = NDArray[np.float64]

SCHEMA: Final = "dmpq.profile/1"


@dataclass(frozen=True, eq=False)
class Profile:
    """Per-expert statistics; N experts in layer-major order, B formats of the menu.

    Attributes:
        spec: Geometry of the model.
        menu: Formats and quantizer that the sensitivities were measured with.
        tokens: Number of calibration tokens.
        text: What the calibration text was.
        fingerprint: SHA-256 of the model's weights.
        full_nll: Negative log-likelihood at full precision, nats per token.
        cost_tokens: What profiling cost, in FLOP-equivalents of a forwarded token.
        hits: int64 (N,), tokens that selected the expert.
        frequency: (N,), share of tokens that select the expert.
        routing_weight: (N,), routing weight given to the expert, averaged over all tokens.
        contribution: (N,), mean absolute gradient of the loss (nats per token) with respect to
            an entry of the expert's output, over the tokens that select it.
        sensitivity: (N, B), KL to the full-precision logits when only this expert is in this
            format, nats per token; on a menu without 16 bits, what the change adds to the KL of
            the widest uniform map.
        projection_sensitivity: (N, 2, B), the same for gate+up and for down alone; or None.
        output_error: (N, B), squared error of the expert's routed output, averaged over all
            calibration tokens.
        proxy: (N, B), squared product of output error and loss gradient per token, averaged:
            a sensitivity from one forward and backward pass (GEMQ, arXiv 2605.23078).
        weight_norm: (N,), Frobenius norm of all the expert's weights.
        kurtosis: (N,), excess kurtosis of the weights.
        outlier_ratio: (N,), largest absolute weight over the mean absolute weight, the maximum
            over the expert's matrices.
        max_row_variance: (N,), largest variance of an input row of weights.
        router_norm: (N,), norm of the expert's router row.
        router_norm_change: (N,), its change since initialisation; NaN where unknown.
        uniform_kl: (B,), KL of every uniform map, nats per token.
    """

    spec: ModelSpec
    menu: Menu
    tokens: int
    text: str
    fingerprint: str
    full_nll: float
    cost_tokens: float
    hits: NDArray[np.int64]
    frequency: Floats
    routing_weight: Floats
    contribution: Floats
    sensitivity: Floats
    projection_sensitivity: Floats | None
    output_error: Floats
    proxy: Floats
    weight_norm: Floats
    kurtosis: Floats
    outlier_ratio: Floats
    max_row_variance: Floats
    router_norm: Floats
    router_norm_change: Floats
    uniform_kl: Floats

    def __post_init__(self) -> None:
        experts, formats = self.spec.num_experts, len(self.menu)
        wide = {"sensitivity", "output_error", "proxy"}
        for name, value in self._arrays().items():
            expected: tuple[int, ...] = (experts, formats) if name in wide else (experts,)
            if name == "uniform_kl":
                expected = (formats,)
            if name == "projection_sensitivity":
                expected = (experts, 2, formats)
            if value.shape != expected:
                raise InputError(
                    f"The profile's {name} has shape {value.shape}, but {experts} experts and "
                    f"{formats} formats need {expected}; measure the profile again."
                )
            if name != "router_norm_change" and not np.isfinite(value).all():
                raise InputError(
                    f"The profile's {name} holds values that are not finite; measure it again."
                )

    @property
    def unhit(self) -> NDArray[np.int64]:
        """Experts that calibration never hit, int64 (M,)."""
        return np.flatnonzero(self.hits == 0)

    def head_room(self) -> dict[str, float]:
        """Return AM/GM of the experts' squared output errors at the narrowest width.

        The gain that an ideal allocation can bring over a uniform one at high resolution
        (coding gain): within the layers by squared output error (mean of their ratios), and over
        all experts by sensitivity. Values near 1 leave nothing to win.
        """
        hit = self.hits > 0
        layers = self.spec.layer_of_expert
        within = [
            _am_over_gm(self.output_error[hit & (layers == layer), 0])
            for layer in np.unique(layers)
        ]
        return {
            "within_layers": float(np.mean(within)),
            "whole_model": _am_over_gm(self.sensitivity[hit, 0]),
        }

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file, atomically."""
        from safetensors.numpy import save

        header = {
            "schema": SCHEMA,
            "spec": self.spec.to_json(),
            "menu": list(self.menu.keys),
            "quantizer": self.menu.quantizer,
            "symmetric": self.menu.symmetric,
            **{name: getattr(self, name) for name in _SCALARS},
        }
        data = save(self._arrays(), metadata={"dmpq": json.dumps(header, sort_keys=True)})
        replace_atomically(path, data)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile.

        Raises:
            InputError: If the file is missing, is no profile, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not os.path.isfile(path):
            raise InputError(
                f"There is no profile at {path}; dmpq.search without --profile writes one."
            )
        try:
            with safe_open(path, framework="numpy") as handle:
                header: dict[str, Any] = json.loads(handle.metadata()["dmpq"])
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            if header["schema"] != SCHEMA:
                raise InputError(
                    f"{path} follows schema {header['schema']!r}, this version reads {SCHEMA!r}; "
                    "measure the profile again."
                )
            arrays.setdefault("projection_sensitivity", None)
            return cls(
                spec=ModelSpec.from_json(header["spec"]),
                menu=Menu.parse(
                    header["menu"], quantizer=header["quantizer"], symmetric=header["symmetric"]
                ),
                **{name: header[name] for name in _SCALARS},
                **arrays,
            )
        except (SafetensorError, KeyError, TypeError, OSError, json.JSONDecodeError) as error:
            raise InputError(
                f"{path} is not a dmpq profile ({error}); dmpq.search without --profile "
                "writes one."
            ) from error

    def _arrays(self) -> dict[str, NDArray[Any]]:
        values = {name: getattr(self, name) for name in _ARRAYS}
        return {name: value for name, value in values.items() if value is not None}


_SCALARS: Final = ("tokens", "text", "fingerprint", "full_nll", "cost_tokens")
_ARRAYS: Final = tuple(
    field.name
    for field in fields(Profile)
    if "NDArray" in str(field.type) or "Floats" in str(field.type)
)


def _am_over_gm(values: Floats) -> float:
    positive = values[values > 0]
    if not positive.size:
        return 1.0
    return float(positive.mean() / np.exp(np.log(positive).mean()))


def reference_profile() -> Profile:
    """Return the profile shipped with the reference checkpoint."""
    with resources.as_file(resources.files("dmpq.reference") / "profile.safetensors") as path:
        return Profile.load(path)
