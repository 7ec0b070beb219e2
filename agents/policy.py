"""A learned proposal that outlives its search: saved as safetensors and JSON, never as pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from dmpq.errors import InputError
from dmpq.features import format_names
from dmpq.files import replace_atomically, safetensors_bytes
from dmpq.formats import Menu
from dmpq.problem import Problem

if TYPE_CHECKING:
    from dmpq.agents.networks import ImportanceNetwork

SCHEMA: Final = "dmpq.policy/1"
CONFIG_FILE: Final = "policy.json"
_EMBEDDING: Final = "embedding"
_MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_SIZE: Final = 1 << 20


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy reads and how its network is built.

    Attributes:
        menu: Keys of the formats it was trained to choose among; others of their widths will do.
        feature_names: Columns of the feature rows it reads.
        context_size: Entries of the problem's context that it reads.
        fingerprint: Of the model that its embedding was learned for.
        decisions: Number of decisions that its embedding was learned for.
        hidden: Width of the hidden layers.
        embedding: Size of the embedding; 0 for none.
        log_scale: Largest absolute log-importance that it proposes.
    """

    menu: tuple[str, ...]
    feature_names: tuple[str, ...]
    context_size: int
    fingerprint: str
    decisions: int
    hidden: int
    embedding: int
    log_scale: float


@dataclass(frozen=True, eq=False)
class Policy:
    """Proposes a bit map from feature rows: for other budgets, devices and models too.

    Attributes:
        config: What it reads and how it is built.
        weights: Parameters of the :class:`~dmpq.agents.networks.ImportanceNetwork`, float32.
        training: What it was trained on; free text values, for people.
    """

    config: PolicyConfig
    weights: Mapping[str, NDArray[np.float32]]
    training: Mapping[str, str]

    def log_importance(self, problem: Problem) -> NDArray[np.float64]:
        """Return the proposed log-importance of each decision, (D,).

        The embedding takes part only on the model it was learned for, with as many decisions;
        everywhere else the feature rows alone decide.

        Raises:
            InputError: If the problem's menu or features are not those of the training.
        """
        import torch as th

        self._check(problem)
        rows = th.from_numpy(np.array(problem.features, dtype=np.float32))
        context = th.from_numpy(np.array(problem.context, dtype=np.float32))
        network = self._network()
        with th.inference_mode():
            if problem.profile.fingerprint != self.config.fingerprint:
                network.embedding.zero_()
            proposal = network(rows[None], context[None])[0].numpy()
        limit = self.config.log_scale
        clipped: NDArray[np.float64] = np.clip(proposal.astype(np.float64), -limit, limit)
        return clipped

    def load_into(self, network: ImportanceNetwork, problem: Problem) -> None:
        """Let a network of this policy's shape propose what the policy proposes on a problem.

        On another model than the policy's own the embedding begins at zero.

        Raises:
            InputError: If the problem's menu or features are not those of the training.
        """
        import torch as th

        self._check(problem)
        own = problem.profile.fingerprint == self.config.fingerprint
        same = own and problem.num_decisions == self.config.decisions
        for name, value in network.state_dict().items():
            if name == _EMBEDDING and not same:
                value.zero_()
            else:
                value.copy_(th.from_numpy(np.array(self.weights[name])))

    def propose(self, problem: Problem) -> NDArray[np.int64]:
        """Return the map that the policy proposes, (D,), within every limit of the problem."""
        return problem.propose(self.log_importance(problem))

    def save(self, folder: str | Path) -> None:
        """Write the policy to a folder, which is made if need be.

        The description names its weights by their digest and is replaced last, so that a reader
        finds the old policy or the new one, never a mixture.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        data = safetensors_bytes(self.weights)
        digest = hashlib.sha256(data).hexdigest()
        description = {
            "schema": SCHEMA,
            "sha256": digest,
            "config": asdict(self.config),
            "training": dict(self.training),
        }
        text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n"
        weights = _weights_file(target, digest)
        replace_atomically(weights, data)
        replace_atomically(target / CONFIG_FILE, text.encode())
        for old in target.glob("weights-*.safetensors"):
            if old != weights:
                old.unlink()

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Read a policy that :meth:`save` wrote.

        Raises:
            InputError: If the folder holds no policy, a damaged one, or one of another schema.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        source = Path(folder) / CONFIG_FILE
        description = _read_description(source)
        try:
            config = _read_config(description["config"])
            digest = str(description["sha256"])
            training = {str(k): str(v) for k, v in description["training"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{source} is no policy description ({error}); save the policy again."
            ) from error
        path = _weights_file(Path(folder), digest)
        if not path.is_file():
            raise InputError(f"{source} names weights that are not there ({path.name}).")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG_FILE}.")
        try:
            policy = cls(config, load(data), training)
            policy._network()
        except (SafetensorError, RuntimeError) as error:
            raise InputError(
                f"The weights in {path} do not fit {CONFIG_FILE}; save the policy again."
            ) from error
        if not all(np.isfinite(value).all() for value in policy.weights.values()):
            raise InputError(f"{path} holds weights that are not finite; train the policy again.")
        return policy

    def _network(self) -> ImportanceNetwork:
        import torch as th

        from dmpq.agents.networks import ImportanceNetwork, NetworkShape

        config = self.config
        with th.random.fork_rng(devices=[]):
            network = ImportanceNetwork(
                NetworkShape(
                    features=len(config.feature_names),
                    context=config.context_size,
                    decisions=config.decisions,
                    hidden=config.hidden,
                    embedding=config.embedding,
                )
            )
        network.load_state_dict({k: th.from_numpy(v.copy()) for k, v in self.weights.items()})
        return network

    def _check(self, problem: Problem) -> None:
        config = self.config
        if format_names(problem.menu) != format_names(Menu.parse(config.menu)):
            raise InputError(
                f"The policy was trained to choose among {','.join(config.menu)}, but the problem "
                f"offers {','.join(problem.menu.keys)}; pass --bits {','.join(config.menu)}, with "
                "groups as the model needs, or train a policy for this menu."
            )
        names = tuple(problem.feature_names)
        if names != config.feature_names or len(problem.context) != config.context_size:
            odd = sorted(set(names) ^ set(config.feature_names)) or ["context"]
            raise InputError(
                f"The policy reads other features than this problem has (they differ in "
                f"{', '.join(odd)}); train it again with this version."
            )


def _weights_file(folder: Path, digest: str) -> Path:
    if len(digest) != hashlib.sha256().digest_size * 2 or not digest.isalnum():
        raise InputError(f"{digest!r} in {CONFIG_FILE} is no SHA-256; save the policy again.")
    return folder / f"weights-{digest[:16]}.safetensors"


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"There is no policy at {path.parent}: {path.name} is missing.")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise InputError(f"{path} is larger than 1 MiB, so it is no policy description.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); save the policy again.") from error
    schema = description.get("schema") if isinstance(description, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path} follows schema {schema!r}, this version reads {SCHEMA!r}.")
    return dict(description)


def _read_config(values: Mapping[str, Any]) -> PolicyConfig:
    known = {field.name for field in fields(PolicyConfig)}
    if set(values) != known:
        raise ValueError(f"config has the wrong fields: {', '.join(sorted(set(values) ^ known))}")
    sizes = {name: values[name] for name in ("context_size", "decisions", "hidden", "embedding")}
    for name, size in sizes.items():
        if type(size) is not int or not 0 <= size <= _MAX_SIZE:
            raise ValueError(f"{name} is {size!r}")
    scale = float(values["log_scale"])
    if not 0 < scale < np.inf:
        raise ValueError(f"log_scale is {scale}")
    return PolicyConfig(
        menu=tuple(str(key) for key in values["menu"]),
        feature_names=tuple(str(name) for name in values["feature_names"]),
        fingerprint=str(values["fingerprint"]),
        log_scale=scale,
        **sizes,
    )
