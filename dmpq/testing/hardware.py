"""What every hardware model must do: inherit :class:`HardwareModelContract` in your own tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dmpq.formats import PRUNED_WIDTH, Format, Menu
from dmpq.hw_models.base import Cost, HardwareModel, Workload
from dmpq.spec import ModelSpec, load_geometry

_MAPS = 5


class HardwareModelContract:
    """Tests of a hardware model; a subclass says which by overriding :meth:`make_model`.

    Example:
        >>> class TestMine(HardwareModelContract):
        ...     def make_model(self):
        ...         return load_hardware("my-device.json")
    """

    def make_model(self) -> HardwareModel:
        """Return the model under test."""
        raise NotImplementedError

    def make_spec(self) -> ModelSpec:
        """Return the geometry to price; small enough for the device."""
        return load_geometry("olmoe-1b-7b")

    def make_menu(self) -> Menu:
        """Return the formats to price."""
        return Menu()

    def workloads(self) -> Iterator[Workload]:
        """Yield the workloads to price."""
        yield Workload()
        yield Workload(batch=16, context=512)
        yield Workload("prefill", batch=1, context=512)

    def _maps(self, columns: int) -> NDArray[np.int64]:
        rng, menu = np.random.default_rng(0), self.make_menu()
        maps = rng.integers(0, len(menu), (_MAPS, columns))
        if columns != self.make_spec().num_experts:
            pairs = maps.reshape(_MAPS, -1, 2)
            half = menu.pruned[pairs].any(axis=2)  # an expert is pruned whole
            pairs[half] = menu.pruned.argmax()
        return maps

    def test_it_says_what_it_is(self) -> None:
        """Results are labelled with these."""
        model = self.make_model()
        for text in (model.name, model.device, model.stack, model.source):
            assert isinstance(text, str)
            assert text
        assert isinstance(model.deterministic, bool)
        assert isinstance(model.calibrated, bool)
        assert model.capacity_bytes > 0

    def test_costs_are_finite_and_positive(self) -> None:
        """Experts and projections, any workload."""
        model, spec = self.make_model(), self.make_spec()
        for workload in self.workloads():
            for columns in (spec.num_experts, 2 * spec.num_experts):
                cost = model.cost(spec, self.make_menu(), self._maps(columns), workload)
                for values in (cost.latency_s, cost.memory_bytes, cost.energy_j):
                    assert values.shape == (_MAPS,)
                    assert values.dtype == np.float64
                    assert np.isfinite(values).all()
                    assert (values > 0).all()

    def test_maps_cost_the_same_together_and_alone(self) -> None:
        """A map's cost is its own, to the bit, where the model is deterministic."""
        model, spec, menu = self.make_model(), self.make_spec(), self.make_menu()
        if not model.deterministic:
            return
        maps = self._maps(spec.num_experts)
        for workload in self.workloads():
            together = model.cost(spec, menu, maps, workload)
            for k, one in enumerate(maps):
                _assert_equal(model.cost(spec, menu, one[None], workload), together, k)

    def test_projections_that_agree_cost_what_the_expert_costs(self) -> None:
        """A map of experts is a map of projections whose pairs agree."""
        model, spec, menu = self.make_model(), self.make_spec(), self.make_menu()
        maps = self._maps(spec.num_experts)
        for workload in self.workloads():
            whole = model.cost(spec, menu, maps, workload)
            split = model.cost(spec, menu, maps.repeat(2, axis=1), workload)
            np.testing.assert_allclose(split.memory_bytes, whole.memory_bytes)
            if model.deterministic:
                np.testing.assert_allclose(split.latency_s, whole.latency_s)

    def test_memory_differs_by_exactly_the_stored_bits(self) -> None:
        """Those on the device, scales and zero-points included; never below the format's own."""
        model, spec, menu = self.make_model(), self.make_spec(), self.make_menu()
        maps = self._maps(spec.num_experts)
        on_device = model.stored_bits(spec, menu)
        assert (on_device >= spec.stored_bits(menu)).all()
        stored = on_device.sum(axis=1)
        expected = stored[np.arange(spec.num_experts), maps].sum(axis=1) / 8
        memory = model.cost(spec, menu, maps, Workload()).memory_bytes
        np.testing.assert_allclose(memory - memory[0], expected - expected[0], atol=1)

    def test_a_pruned_expert_costs_nothing(self) -> None:
        """No byte, no time; what is left costs what it does where nothing can be pruned."""
        model, spec, menu = self.make_model(), self.make_spec(), self.make_menu()
        more = replace(menu, formats=(Format(PRUNED_WIDTH), *menu.formats[-2:]))
        less = replace(menu, formats=menu.formats[-2:])
        assert not model.stored_bits(spec, more)[:, :, 0].any()
        maps = np.arange(spec.num_experts)[None] % 2
        pruned = np.where(np.arange(spec.num_experts) % 3, maps + 1, 0)
        for workload in self.workloads():
            assert not model.expert_latency(spec, more, workload)[:, :, 0].any()
            whole, same = (
                model.cost(spec, *which, workload) for which in ((less, maps), (more, maps + 1))
            )
            if model.deterministic:
                _assert_equal(same, whole, 0)
            part = model.cost(spec, more, pruned, workload)
            nothing = model.cost(spec, more, np.zeros_like(maps), workload)
            assert 0 < nothing.memory_bytes[0] < part.memory_bytes[0] < whole.memory_bytes[0]
            assert 0 < nothing.latency_s[0] < whole.latency_s[0]
            assert 0 < nothing.energy_j[0] < whole.energy_j[0]

    def test_linearised_latency_has_the_right_shape(self) -> None:
        """Searches project latency limits with it."""
        model, spec, menu = self.make_model(), self.make_spec(), self.make_menu()
        for workload in self.workloads():
            seconds = model.expert_latency(spec, menu, workload)
            assert seconds.shape == (spec.num_experts, 2, len(menu))
            assert np.isfinite(seconds).all()
            assert (seconds >= 0).all()

    def test_notes_name_formats(self) -> None:
        """A note begins with the menu key that it is about."""
        menu = self.make_menu()
        for note in self.make_model().unsupported(menu):
            assert note.partition(":")[0] in menu.keys

    def test_every_format_has_a_kernel_in_words(self) -> None:
        """The summary of a search says what each format's time is of."""
        menu = self.make_menu()
        kernels = self.make_model().kernels(menu)
        assert tuple(kernels) == menu.keys
        assert all(kernel.isprintable() and kernel.strip() for kernel in kernels.values())

    def test_notes_are_one_line_each(self) -> None:
        """Commands print them."""
        assert all(note.isprintable() and note for note in self.make_model().notes())


def _assert_equal(alone: Cost, together: Cost, k: int) -> None:
    for name in ("latency_s", "memory_bytes", "energy_j"):
        assert getattr(alone, name)[0] == getattr(together, name)[k]
