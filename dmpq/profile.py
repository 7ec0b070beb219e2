"""What is known of each expert before a search: use, sensitivity, error, weight statistics.

A profile is measured once (:mod:`dmpq.profiling`), saved as one safetensors file, and searched
anywhere: it holds no weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dmpq.data import CalibrationText, Draw
from dmpq.errors import InputError, first_line
from dmpq.files import replace_atomically, safetensors_bytes
from dmpq.formats import Menu
from dmpq.spec import ModelSpec

Floats = NDArray[np.float64]

Signal = Literal["sensitivity", "gradient"]

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
            calibration tokens; where it is pruned, of its layer's, whose other experts then weigh
            more.
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
        drawn: Which windows of its text it was measured on; ``None`` where unknown.
        calibration: What GPTQ was calibrated by; ``None`` for other quantizers, and where the
            text of ``drawn`` calibrated it, as in profiles of before.
        signal: Whether sensitivities were measured, one evaluation per variant, or are half the
            proxy, and the uniform KLs their sums.
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
    drawn: Draw | None = None
    calibration: CalibrationText | None = None
    signal: Signal = "sensitivity"

    def __post_init__(self) -> None:
        self._check_scalars()
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

    def _check_scalars(self) -> None:
        for name in ("text", "fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"The profile's {name} is no text; measure the profile again.")
        if self.signal not in get_args(Signal):
            raise InputError(
                f"The profile's signal is {str(self.signal)[:60]!r}, neither sensitivity nor "
                "gradient; measure the profile again."
            )
        for name in ("tokens", "full_nll", "cost_tokens"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not np.isfinite(value) or value < 0:
                raise InputError(
                    f"The profile's {name} is {str(value)[:60]!r}, no number of 0 or more; "
                    "measure the profile again."
                )
        for name, array in self._arrays().items():
            kind = np.integer if name == "hits" else np.floating
            if not np.issubdtype(array.dtype, kind) or (name in _SHARES and (array < 0).any()):
                raise InputError(
                    f"The profile's {name} holds other values than it may ({array.dtype}); "
                    "measure the profile again."
                )

    @property
    def unhit(self) -> NDArray[np.int64]:
        """Experts that calibration never hit, int64 (M,)."""
        return np.flatnonzero(self.hits == 0)

    def head_room(self) -> dict[str, float]:
        """Return AM/GM of the experts' squared output errors at the narrowest stored width.

        The gain that an ideal allocation can bring over a uniform one at high resolution
        (coding gain): within the layers by squared output error (mean of their ratios), and over
        all experts by sensitivity. Values near 1 leave nothing to win.
        """
        hit, narrowest = self.hits > 0, self.menu.narrowest
        layers = self.spec.layer_of_expert
        within = [
            _am_over_gm(self.output_error[hit & (layers == layer), narrowest])
            for layer in np.unique(layers)
        ]
        return {
            "within_layers": float(np.mean(within)),
            "whole_model": _am_over_gm(self.sensitivity[hit, narrowest]),
        }

    def save(self, path: str | Path) -> None:
        """Write the profile as one safetensors file, atomically."""
        header = {
            "schema": SCHEMA,
            "spec": self.spec.to_json(),
            "menu": list(self.menu.keys),
            "quantizer": self.menu.quantizer,
            "symmetric": self.menu.symmetric,
            "signal": self.signal,
            **{name: getattr(self, name) for name in _SCALARS},
            **({} if self.drawn is None else {"drawn": asdict(self.drawn)}),
            **({} if self.calibration is None else {"calibration": self.calibration.to_json()}),
        }
        metadata = {"dmpq": json.dumps(header, sort_keys=True)}
        data = safetensors_bytes(self._arrays(), metadata=metadata)
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
                drawn=_read_draw(header.get("drawn")),
                calibration=_read_calibration(header.get("calibration")),
                signal=header.get("signal", "sensitivity"),
                **arrays,
            )
        except InputError:
            raise
        except (SafetensorError, LookupError, TypeError, ValueError, AttributeError, OSError) as e:
            raise InputError(
                f"{path} is not a dmpq profile ({first_line(e)}); dmpq.search without --profile "
                "writes one."
            ) from e

    def _arrays(self) -> dict[str, NDArray[Any]]:
        values = {name: getattr(self, name) for name in _ARRAYS}
        return {name: value for name, value in values.items() if value is not None}


def _read_draw(data: Any) -> Draw | None:
    """Return what the file says of its windows; ``None`` for a file that says nothing."""
    match data:
        case None:
            return None
        case {"stream": str(stream), "length": int(length), "windows": [*windows]} if (
            length > 0 and all(type(w) is int and 0 <= w < _MOST_WINDOWS for w in windows)
        ):
            return Draw(stream, length, tuple(windows))
    raise InputError("The profile's drawn windows are damaged; measure the profile again.")


def _read_calibration(data: Any) -> CalibrationText | None:
    """Return what the file says of the text that calibrated GPTQ, where it says something."""
    match data:
        case None:
            return None
        case {"dataset": str(dataset), **rest}:
            draw = _read_draw(rest)
            assert draw is not None
            return CalibrationText(dataset, draw)
    raise InputError("The profile's calibration is damaged; measure the profile again.")


_MOST_WINDOWS: Final = 1 << 40
_SHARES: Final = frozenset({"hits", "frequency"})
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


def empty_profile(spec: ModelSpec, menu: Menu, *, tokens: int) -> Profile:
    """Return a profile of zeros, on which a problem checks its limits before any forward.

    The routing is not known yet. A single token selects ``top_k`` experts whatever it is. More
    tokens are taken to select the same ones all together: the fewest experts, so that a limit
    which even that exceeds is infeasible for certain.
    """
    experts, formats = spec.num_experts, len(menu)
    shares = [
        np.full(layer.num_experts, layer.top_k / layer.num_experts)
        if tokens == 1
        else (np.arange(layer.num_experts) < layer.top_k).astype(float)
        for layer in spec.moe_layers
    ]
    flat, wide = np.zeros(experts), np.zeros((experts, formats))
    return Profile(
        spec=spec,
        menu=menu,
        tokens=0,
        text="none",
        fingerprint="",
        full_nll=0.0,
        cost_tokens=0.0,
        hits=np.zeros(experts, np.int64),
        frequency=np.concatenate(shares),
        routing_weight=flat,
        contribution=flat,
        sensitivity=wide,
        projection_sensitivity=np.zeros((experts, 2, formats)),
        output_error=wide,
        proxy=wide,
        weight_norm=flat,
        kurtosis=flat,
        outlier_ratio=flat,
        max_row_variance=flat,
        router_norm=flat,
        router_norm_change=flat,
        uniform_kl=np.ones(formats),
    )


def reference_profile() -> Profile:
    """Return the profile shipped with the reference checkpoint."""
    with resources.as_file(resources.files("dmpq.reference") / "profile.safetensors") as path:
        return Profile.load(path)
