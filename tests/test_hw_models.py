"""Hardware models: the contract, the equations against slow twins, and hostile device files."""

import json
from pathlib import Path

import numpy as np
import pytest

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models import Workload, list_hardware, load_hardware
from dmpq.hw_models.routing import active_probability, padded_rows
from dmpq.spec import load_geometry
from dmpq.testing.hardware import HardwareModelContract

OLMOE = load_geometry("olmoe-1b-7b")
MENU = Menu()
FILES = Path(__file__).parents[1] / "hw_models"


class TestShipped(HardwareModelContract):
    @pytest.fixture(autouse=True, params=list_hardware())
    def _device(self, request):
        self.hardware = request.param

    def make_model(self):
        return load_hardware(self.hardware)


def uniform(key):
    return np.full((1, OLMOE.num_experts), MENU.index(key))


def latency(hardware, key, workload):
    return load_hardware(hardware).cost(OLMOE, MENU, uniform(key), workload).latency_s[0]


def test_expected_distinct_experts_match_monte_carlo():
    rng = np.random.default_rng(0)
    inclusion = rng.uniform(0.01, 0.4, 32)
    drawn = rng.random((20_000, 6, 32)) < inclusion
    woken = drawn.any(axis=1).sum(axis=1)
    error = 4 * woken.std() / np.sqrt(len(woken))
    assert active_probability(inclusion, 6).sum() == pytest.approx(woken.mean(), abs=error)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8), (4, 29.1), (64, 125.9)])
def test_distinct_experts_of_uniform_routing(tokens, expected):
    woken = active_probability(np.full(128, 8 / 128), tokens).sum()
    assert woken == pytest.approx(expected, abs=0.05)


def test_rows_are_padded_to_tiles():
    rows = padded_rows(np.array([1.0, 1.0, 0.0, 0.25]), 1, 16)
    np.testing.assert_allclose(rows, [16, 16, 0, 4])
    assert padded_rows(np.array([1.0]), 17, 16).tolist() == [32]


def test_latency_matches_the_formula_written_out():
    model, workload = load_hardware("a100"), Workload(batch=4)
    rng = np.random.default_rng(1)
    maps = rng.integers(0, 5, (1, OLMOE.num_experts))
    parts = model.breakdown(OLMOE, MENU, maps, workload)
    active = 1 - (1 - 8 / 64) ** 4
    tile = model.kernel_stack.tile_rows
    rows = tile * np.ceil(4 * 8 / 64 / active / tile)
    stored = OLMOE.stored_bits(MENU)[0] / 8
    for layer in (0, 7):
        chosen = maps[0, layer * 64 : (layer + 1) * 64]
        experts, launches = 0.0, 0.0
        for b in np.unique(chosen):
            kernel = model.kernel_stack.kernel(int(MENU.bits[b]))
            read_as = MENU.index(str(kernel.bits))
            for p, shape in enumerate((OLMOE.moe_layers[0].gate_up_shape, (2048, 1024))):
                count = (chosen == b).sum()
                woken, weights = count * active, np.prod(shape)
                memory = woken * stored[p, read_as] / (kernel.memory_efficiency * 2039e9)
                compute = woken * rows * 2 * weights / (kernel.compute_efficiency * 312e12)
                unpack = woken * weights / (kernel.dequantized_weights_per_s or np.inf)
                experts += (memory**4 + compute**4 + unpack**4) ** 0.25
                launches += kernel.launch_s / 2
        assert parts.experts_s[0, layer] == pytest.approx(experts)
        assert parts.launches_s[0, layer] == pytest.approx(launches)


@pytest.mark.parametrize("hardware", list_hardware())
@pytest.mark.parametrize("key", MENU.keys)
def test_latency_rises_with_tokens(hardware, key):
    times = [latency(hardware, key, Workload(batch=b)) for b in (1, 4, 16, 64, 256)]
    assert times == sorted(times)
    assert times[0] < times[-1]


def test_decode_traffic_and_latency_fall_with_bits_on_a100():
    model = load_hardware("a100")
    supported = ("2", "4", "8", "16")
    maps = np.concatenate([uniform(key) for key in supported])
    parts = model.breakdown(OLMOE, MENU, maps, Workload())
    assert (np.diff(parts.traffic_bytes) > 0).all()
    assert (np.diff(parts.latency_s) > 0).all()


@pytest.mark.parametrize("hardware", ["a100", "h100"])
def test_weight_only_kernels_lose_at_many_tokens(hardware):
    many = Workload("prefill", batch=4, context=2048)
    assert latency(hardware, "4", many) > latency(hardware, "16", many)
    assert latency(hardware, "4", Workload()) < latency(hardware, "16", Workload())


def test_fewer_distinct_experts_cost_less_traffic():
    model, skewed = load_hardware("a100"), np.tile([1.0] * 8 + [0.0] * 56, 16)
    even = model.cost(OLMOE, MENU, uniform("4"), Workload(batch=16))
    uneven = model.cost(OLMOE, MENU, uniform("4"), Workload(batch=16), inclusion=skewed)
    assert uneven.latency_s[0] < even.latency_s[0]
    assert uneven.memory_bytes[0] == even.memory_bytes[0]


def test_memory_is_exact():
    cost = load_hardware("a100").cost(OLMOE, MENU, uniform("4"), Workload(batch=2, context=100))
    cache = 2 * 100 * 16 * 2 * 2048 * 2
    activations = 2 * 8 * (2 * 2048 + 3 * 1024) * 2
    weights = OLMOE.expert_parameters * 4.25 / 8 + OLMOE.other_parameters * 2
    assert cost.memory_bytes[0] == weights + cache + activations


def test_one_launch_per_width_present():
    model = load_hardware("a100")
    maps = np.concatenate([uniform("4"), uniform("4")])
    maps[1, :2] = MENU.index("2"), MENU.index("8")
    launches = model.breakdown(OLMOE, MENU, maps, Workload()).launches_s
    one = model.kernel_stack.kernel(4).launch_s
    assert launches[0] == pytest.approx(np.full(16, one))
    assert launches[1] == pytest.approx(np.array([3 * one] + [one] * 15))


def test_linearised_latency_adds_up_for_uniform_maps():
    model = load_hardware("rtx4090")
    linear = model.expert_latency(OLMOE, MENU, Workload(batch=8)).sum(axis=(0, 1))
    maps = np.concatenate([uniform(key) for key in MENU.keys])
    parts = model.breakdown(OLMOE, MENU, maps, Workload(batch=8))
    np.testing.assert_allclose(linear, (parts.experts_s + parts.launches_s).sum(axis=1))


def test_width_without_kernel_is_stored_narrow_and_timed_wide():
    model = load_hardware("a100/gemlite")
    three, four = (model.cost(OLMOE, MENU, uniform(k), Workload()) for k in ("3", "4"))
    assert three.latency_s[0] == four.latency_s[0]
    assert three.memory_bytes[0] < four.memory_bytes[0]
    (note,) = model.unsupported(MENU)
    assert note.startswith("3:")


def test_kernels_are_named_by_the_stack_and_the_width_that_is_modelled():
    kernels = load_hardware("a100/sglang").kernels(MENU)
    assert kernels["3"] == "sglang, modelled at 4 bits"
    assert kernels["16"] == "sglang, modelled at 16 bits"
    assert load_hardware("coral-edge-tpu").kernels(MENU)["16"].endswith("modelled at 2 x 8 bits")


def test_power_is_a_share_of_tdp_or_fitted_within_limits():
    fixed = load_hardware("a100").breakdown(OLMOE, MENU, uniform("4"), Workload())
    assert fixed.power_w[0] == 300
    fitted = load_hardware("h100")
    light = fitted.breakdown(OLMOE, MENU, uniform("4"), Workload()).power_w[0]
    heavy = fitted.breakdown(OLMOE, MENU, uniform("16"), Workload("prefill", 16)).power_w[0]
    assert fitted.facts.power.base_w < light < heavy == 700


def test_gemlite_ceiling_reproduces_the_published_speedups():
    model = load_hardware("rtx4090")
    weights = 16384**2
    times = {}
    for kernel in model.kernel_stack.kernels:
        beta = {2: 2.25, 3: 3.25, 4: 4.25, 8: 8.0, 16: 16.0}[kernel.bits]
        memory = weights * beta / 8 / (kernel.memory_efficiency * 1008e9)
        unpack = weights / (kernel.dequantized_weights_per_s or np.inf)
        times[kernel.bits] = (memory**4 + unpack**4) ** 0.25
    published = {2: 5.15, 3: 4.22, 4: 3.35, 8: 1.92}
    for bits, speedup in published.items():
        assert times[16] / times[bits] == pytest.approx(speedup, rel=0.1)


def test_names_aliases_and_stacks():
    assert load_hardware("a100") == load_hardware("a100-80gb") == load_hardware("a100/gemlite")
    assert load_hardware("a100/sglang").stack == "sglang"
    assert {"a100", "h100", "h200", "v100", "rtx4090", "cpu"} <= set(list_hardware())
    with pytest.raises(InputError, match="did you mean 'a100"):
        load_hardware("a1000")
    with pytest.raises(InputError, match="did you mean 'gemlite'"):
        load_hardware("a100/gemlit")
    with pytest.raises(InputError, match="There is no device file"):
        load_hardware("nowhere.json")


def test_facts():
    h100, v100 = load_hardware("h100").facts, load_hardware("v100").facts
    assert h100.peak_int4_flops_per_s is None
    assert h100.peak_bf16_flops_per_s == 989e12
    assert v100.peak_bf16_flops_per_s is None
    assert not any(load_hardware(name).calibrated for name in list_hardware())


def test_workload_is_checked():
    assert Workload("prefill", 2, 10).tokens == 20
    assert Workload("decode", 2, 10).tokens == 2
    with pytest.raises(InputError, match="did you mean 'decode'"):
        Workload("decod")
    with pytest.raises(InputError, match="batch is 0"):
        Workload(batch=0)


@pytest.mark.parametrize(
    "maps",
    [np.zeros(1024, int), np.zeros((1, 3), int), np.full((1, 1024), 5), np.zeros((1, 1024))],
)
def test_misfitting_assignments_are_refused(maps):
    with pytest.raises(InputError, match="assignments"):
        load_hardware("a100").cost(OLMOE, MENU, maps, Workload())


@pytest.mark.parametrize("inclusion", [np.zeros(3), np.full(1024, 1.5), np.full(1024, np.nan)])
def test_misfitting_inclusion_is_refused(inclusion):
    with pytest.raises(InputError, match="routing probabilities"):
        load_hardware("a100").cost(OLMOE, MENU, uniform("4"), Workload(), inclusion=inclusion)


def test_users_file_by_path(tmp_path):
    data = json.loads((FILES / "a100.json").read_text())
    data["bandwidth_bytes_per_s"] /= 2
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(data))
    mine = load_hardware(str(file)).cost(OLMOE, MENU, uniform("16"), Workload())
    assert mine.latency_s[0] > latency("a100", "16", Workload())


def _broken(change):
    data = json.loads((FILES / "a100.json").read_text())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "schema"),
        ("[" * 100_000, "cannot be read"),
        ('{"schema": "dmpq.device/1", "schema": "x"}', "written twice"),
        (_broken(lambda d: d.update(bandwidth_bytes_per_s=2039)), "unit of its name"),
        (_broken(lambda d: d.update(bandwidth_bytes_per_s=float("nan"))), "finite number"),
        (_broken(lambda d: d.update(bandwidth_bytes_per_s=10**400)), "finite number"),
        (_broken(lambda d: d.update(tdp_w="400")), "finite number"),
        (_broken(lambda d: d.update(calibrated=1)), "true or false"),
        (_broken(lambda d: d.update(bandwith=1)), "bandwidth_bytes_per_s|Unknown name"),
        (_broken(lambda d: d.pop("capacity_bytes")), "has no capacity_bytes"),
        (_broken(lambda d: d.update(stacks=[])), "no kernel stack"),
        (_broken(lambda d: d["stacks"][0]["kernels"].pop()), "no kernel for 16 bits"),
        (_broken(lambda d: d["stacks"][0]["kernels"][0].update(math="int5")), "did you mean"),
        (_broken(lambda d: d.update(peak_bf16_flops_per_s=None)), "no peak for 'bf16'"),
        (_broken(lambda d: d.update(idle_w=500)), "not below tdp_w"),
        (_broken(lambda d: d["sources"].pop("idle_w")), "neither a source"),
        (_broken(lambda d: d.update(peak_int8_flops_per_s=100e12)), "dense peaks"),
        (_broken(lambda d: d["stacks"].append(dict(d["stacks"][0]))), "twice"),
    ],
)
def test_hostile_device_files_end_in_one_sentence(tmp_path, text, message):
    file = tmp_path / "device.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_hardware(str(file))
    assert "\n" not in str(caught.value)
