"""Device files: what ships, what widths are stored and run as, and files that must be refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpq.errors import InputError
from dmpq.formats import Menu
from dmpq.hw_models import Workload, list_hardware, load_hardware
from dmpq.hw_models.catalogue import ALIASES, MEASURED, shipped
from dmpq.hw_models.device import Kernel, Stack, figures
from dmpq.hw_models.tables import build_tables
from dmpq.spec import load_geometry

OLMOE = load_geometry("olmoe-1b-7b")
MENU = Menu()
FILES = Path(__file__).parents[1] / "hw_models"
PAIRS = [f"{name}/{stack.name}" for name in list_hardware() for stack in shipped(name).stacks]
OF_THE_ISSUE = {
    *("v100", "t4", "a100-40gb", "a100", "h100", "h200", "l4", "l40s", "rtx3060", "rtx4090"),
    *("b200", "jetson-agx-orin", "jetson-orin-nano", "coral-edge-tpu", "tpu-v5e"),
    *("sapphire-rapids", "epyc-9654", "graviton3", "raspberry-pi-5", "m2-max"),
}


def uniform(*keys):
    return np.array([[MENU.index(key)] * OLMOE.num_experts for key in keys])


def costs(hardware, *keys):
    return load_hardware(hardware).cost(OLMOE, MENU, uniform(*keys), Workload())


def test_every_device_of_the_issue_ships():
    assert set(list_hardware()) >= OF_THE_ISSUE


@pytest.mark.parametrize("name", list_hardware())
def test_every_figure_has_a_source_even_where_it_is_assumed(name):
    device = shipped(name)
    assert device.name == name
    assert set(device.figures()) <= set(device.sources)
    assert all(device.sources.values())
    for stack in device.stacks:
        assert stack.source
        assert f"stacks.{stack.name}" in {*device.sources, *device.assumed}
        assert all(kernel.source for kernel in stack.kernels)


@pytest.mark.parametrize("name", list_hardware())
def test_what_says_that_it_is_assumed_is_marked(name):
    for stack in shipped(name).stacks:
        whole = f"stacks.{stack.name}" in shipped(name).assumed
        for kernel in stack.kernels:
            own = figures(kernel).keys() - {"bits", "passes"}
            if kernel.source.startswith("assumed"):
                assert whole or own <= set(kernel.assumed)
            if "the rest assumed" in kernel.source:
                assert kernel.assumed


@pytest.mark.parametrize("hardware", PAIRS)
def test_a_stack_is_honest_about_order(hardware):
    """Memory never falls with width, nor does time by much where a wider kernel does the work."""
    cost = costs(hardware, *MENU.keys)
    assert (np.diff(cost.memory_bytes) >= 0).all()
    kernels = load_hardware(hardware).kernel_stack
    for i, narrow in enumerate(MENU.bits):
        for j, wide in enumerate(MENU.bits[i + 1 :], i + 1):
            if kernels.kernel(int(narrow)) is kernels.kernel(int(wide)):
                assert cost.latency_s[i] <= cost.latency_s[j] * (1 + 1e-12)


def test_sparse_figures_of_the_sheets_are_halved():
    agx, nano = shipped("jetson-agx-orin"), shipped("jetson-orin-nano")
    assert agx.peak_int8_flops_per_s == 171e12 / 2
    assert nano.peak_int8_flops_per_s == 67e12 / 2
    assert "275 TOPS" in agx.note


def test_facts_computed_from_stated_facts():
    assert shipped("epyc-9654").bandwidth_bytes_per_s == 12 * 4800e6 * 8
    assert shipped("graviton3").bandwidth_bytes_per_s == 8 * 4800e6 * 8
    assert shipped("raspberry-pi-5").bandwidth_bytes_per_s == pytest.approx(4267e6 * 4, rel=1e-3)
    assert shipped("rtx3060").peak_fp16_flops_per_s == pytest.approx(
        112 * 256 * 1.777e9 / 2, rel=0.01
    )


def token_s(kernel, device, *, weights, stored_bytes):
    """A token's time by one kernel alone, as the roofline has it at one token."""
    memory = stored_bytes / (kernel.memory_efficiency * device.bandwidth_bytes_per_s)
    return (memory**4 + (weights / (kernel.dequantized_weights_per_s or np.inf)) ** 4) ** 0.25


@pytest.mark.parametrize(
    ("hardware", "bits", "weights", "gigabytes", "layers", "tokens_per_s"),
    [
        # Mixtral-8x7B activates 12.9 of 46.7 G weights; GiB are the files' (llama.cpp PR 4406).
        ("m2-max/llama.cpp", 3, 12.9e9, 18.96 * 1.0737 * 12.9 / 46.7, 32, 28.35),
        ("m2-max/llama.cpp", 4, 12.9e9, 24.62 * 1.0737 * 12.9 / 46.7, 32, 36.66),
        ("m2-max/llama.cpp", 8, 12.9e9, 46.22 * 1.0737 * 12.9 / 46.7, 32, 22.87),
        # Llama-2-7B (T-MAC docs/profiling_data.md and README).
        ("jetson-agx-orin/llama.cpp", 2, 6.6e9, 2.83, 32, 20.03),
        ("jetson-agx-orin/t-mac", 2, 6.74e9, 6.74 * 2.25 / 8, 32, 15.62),
        ("jetson-agx-orin/t-mac", 4, 6.74e9, 6.74 * 4.25 / 8, 32, 8.09),
        ("raspberry-pi-5/t-mac", 2, 6.74e9, 6.74 * 2.25 / 8, 32, 5.92),
        ("raspberry-pi-5/t-mac", 4, 6.74e9, 6.74 * 4.25 / 8, 32, 3.35),
        ("raspberry-pi-5/llama.cpp", 4, 14.8e9, 8.99, 48, 1.20),
        ("jetson-orin-nano/mlc", 4, 8.03e9, 4.5, 32, 19.14),
        ("jetson-orin-nano/llama.cpp", 4, 3.21e9, 2.02, 28, 30),
    ],
)
def test_figures_give_back_the_published_speeds_they_come_from(
    hardware, bits, weights, gigabytes, layers, tokens_per_s
):
    model = load_hardware(hardware)
    step = token_s(
        model.kernel_stack.kernel(bits), model.facts, weights=weights, stored_bytes=gigabytes * 1e9
    )
    assert 1 / (step + layers * model.kernel_stack.layer_s) == pytest.approx(
        tokens_per_s, rel=0.05
    )


def test_cpus_unpack_narrow_widths_more_slowly_than_wide_ones():
    two, three, four = costs("raspberry-pi-5", "2", "3", "4").latency_s
    assert four < two
    assert four < three
    by_table = costs("raspberry-pi-5/t-mac", "2", "3", "4").latency_s
    assert (np.diff(by_table) > 0).all()


class TestEdgeTpu:
    model = load_hardware("coral-edge-tpu")

    def test_low_widths_are_stored_and_timed_as_eight(self):
        cost = costs("coral-edge-tpu", "2", "3", "4", "8")
        for values in (cost.latency_s, cost.memory_bytes, cost.energy_j):
            assert (values == values[0]).all()

    def test_mixing_widths_that_are_stored_alike_costs_nothing(self):
        rng = np.random.default_rng(0)
        mixed = rng.integers(0, 4, (3, OLMOE.num_experts))
        cost = self.model.cost(OLMOE, MENU, mixed, Workload(batch=4))
        eight = self.model.cost(OLMOE, MENU, uniform("8"), Workload(batch=4))
        assert (cost.latency_s == eight.latency_s).all()
        assert (cost.memory_bytes == eight.memory_bytes).all()

    def test_sixteen_bits_take_two_passes_and_twice_the_room(self):
        eight, sixteen = costs("coral-edge-tpu", "8", "16").latency_s
        assert sixteen > eight
        tables = build_tables(
            self.model.facts, self.model.kernel_stack, OLMOE, MENU, Workload(), None
        )
        assert (tables.row_s[:, :, 4] == 2 * tables.row_s[:, :, 3]).all()
        parts = self.model.breakdown(OLMOE, MENU, uniform("8", "16"), Workload())
        assert parts.launches_s[1] == pytest.approx(2 * parts.launches_s[0])
        assert parts.expert_bytes[1] == OLMOE.expert_parameters * 2

    def test_bits_in_memory_are_those_of_the_storage(self):
        stored = self.model.stored_bits(OLMOE, MENU)
        own = OLMOE.stored_bits(MENU)
        np.testing.assert_array_equal(stored[:, :, :4], own[:, :, [3] * 4])
        np.testing.assert_array_equal(stored[:, :, 4], own[:, :, 4])

    def test_a_group_keeps_its_scales(self):
        menu = Menu.parse("2g32,8")
        stored = self.model.stored_bits(OLMOE, menu)
        eight = OLMOE.stored_bits(Menu.parse("8g32"))
        np.testing.assert_array_equal(stored[:, :, 0], eight[:, :, 0])
        assert (stored[:, :, 0] > stored[:, :, 1]).all()

    def test_everything_else_is_costed_at_eight_bits(self):
        parts = self.model.breakdown(OLMOE, MENU, uniform("8"), Workload(batch=2, context=100))
        cache = 2 * 100 * 16 * 2 * 2048
        activations = 2 * 8 * (2 * 2048 + 3 * 1024)
        assert parts.resident_bytes == OLMOE.other_parameters + cache + activations

    def test_each_rule_is_said(self):
        notes = dict(note.split(": ", 1) for note in self.model.unsupported(MENU))
        assert set(notes) == {"2", "3", "4", "16"}
        assert notes["2"].endswith("cannot store 2 bits; stored and timed as 8 bits")
        assert notes["16"].endswith("stored at 16 bits, timed as 2 passes of 8 bits")
        assert any("what that loses is not measured" in note for note in self.model.notes())


@pytest.mark.parametrize("hardware", [p for p in PAIRS if not p.startswith("coral")])
def test_other_devices_store_every_width_as_it_is(hardware):
    np.testing.assert_array_equal(
        load_hardware(hardware).stored_bits(OLMOE, MENU), OLMOE.stored_bits(MENU)
    )


def test_notes_say_what_is_assumed_and_what_a_short_name_means():
    a100, l4 = load_hardware("a100"), load_hardware("l4")
    assert any("80 GB" in note and "a100-40gb" in note for note in a100.notes())
    assert "all of stack gemlite" in l4.assumed
    assert "assumed: all of stack gemlite" in l4.source
    assert "idle_w" not in l4.assumed  # without a power fit, no cost depends on it
    m2 = load_hardware("m2-max")
    assert "peak_fp16_flops_per_s" in m2.assumed
    assert "all of 16 bits" in m2.source
    assert any("of 2, 3 and 4 bits" in text for text in m2.assumed)


def test_aliases_name_devices_and_reserved_names_are_free():
    assert set(ALIASES.values()) <= set(list_hardware())
    assert not set(ALIASES) & set(list_hardware())
    assert not {*MEASURED} & {*ALIASES, *list_hardware()}
    assert load_hardware("A100-80GB") == load_hardware("a100")


def test_a_stack_of_a_users_file(tmp_path):
    file = write(tmp_path, {})
    assert load_hardware(f"{file}/sglang").stack == "sglang"
    assert load_hardware(str(file)).stack == "gemlite"
    with pytest.raises(InputError, match="did you mean 'sglang'"):
        load_hardware(f"{file}/sglan")


def write(folder, change, base="a100"):
    data = json.loads((FILES / f"{base}.json").read_text())
    if callable(change):
        change(data)
    else:
        data.update(change)
    file = folder / "device.json"
    file.write_text(json.dumps(data))
    return file


def refused(file):
    with pytest.raises(InputError) as caught:
        load_hardware(str(file))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        ("a100", {"peaks": "sparse"}, "peaks are sparse ones"),
        ("a100", {"peak_fp16_flops_per_s": 624e12}, "twice the dense peak of NVIDIA A100"),
        ("a100", {"name": "mine", "peak_fp16_flops_per_s": 624e12}, "twice the dense peak"),
        (
            "h100",
            {"name": "card", "description": "my H100", "peak_fp8_flops_per_s": 3958e12},
            "twice the dense peak of NVIDIA H100",
        ),
        ("l40s", {"peak_int8_flops_per_s": 1466e12}, "twice the dense peak of NVIDIA L40S"),
        ("rtx4090", {"peak_int8_flops_per_s": 1321e12}, "times the peak of the next wider"),
        ("jetson-orin-nano", {"peak_int8_flops_per_s": 67e12}, "twice the dense peak"),
        ("tpu-v5e", {"peak_int8_flops_per_s": 1600e12}, "times the peak of the next wider"),
        ("a100", {"peak_int8_flops_per_s": 313e9}, "lower peak"),
    ],
)
def test_sparse_peaks_are_refused(tmp_path, base, change, message):
    assert message in refused(write(tmp_path, change, base))


def test_a_source_that_speaks_of_sparsity_must_say_that_it_was_halved(tmp_path):
    def sparse(data):
        data.update(name="x", description="x")
        data["sources"]["peak_int8_flops_per_s"] = "data sheet, with sparsity"

    assert "speaks of a sparse figure" in refused(write(tmp_path, sparse))

    def halved(data):
        sparse(data)
        data["sources"]["peak_int8_flops_per_s"] += ", halved"

    assert load_hardware(str(write(tmp_path, halved))).name == "x"


@pytest.mark.parametrize(
    ("base", "change"),
    [
        # Two cards in one file, 16-bit accumulation on GeForce, and another part of the name.
        (
            "a100",
            {
                "peak_bf16_flops_per_s": 624e12,
                "peak_fp16_flops_per_s": 624e12,
                "peak_int8_flops_per_s": 1248e12,
                "peak_int4_flops_per_s": 2496e12,
                "bandwidth_bytes_per_s": 4078e9,
            },
        ),
        ("rtx4090", {"peak_fp16_flops_per_s": 330e12}),
        ("h100", {"peak_fp16_flops_per_s": 756e12, "peak_bf16_flops_per_s": 756e12}),
        ("a100", {"description": "an unknown part", "name": "x", "peak_fp16_flops_per_s": 624e12}),
    ],
)
def test_honest_files_are_not_taken_for_sparse(tmp_path, base, change):
    assert load_hardware(str(write(tmp_path, change, base))).name


@pytest.mark.parametrize("name", list_hardware())
def test_every_shipped_file_passes_as_a_users_own(name):
    assert load_hardware(str(FILES / f"{name}.json")).name == name


UNITS = [
    ("capacity_bytes", 80.0, "GB"),
    ("capacity_bytes", 80e3, "MB"),
    ("capacity_bytes", 80e6, "KB"),
    ("runtime_bytes", 2.0, "GB"),
    ("bandwidth_bytes_per_s", 2.039, "TB/s"),
    ("bandwidth_bytes_per_s", 2039.0, "GB/s"),
    ("bandwidth_bytes_per_s", 2.039e6, "MB/s"),
    ("peak_bf16_flops_per_s", 0.312, "PFLOPS"),
    ("peak_bf16_flops_per_s", 312.0, "TFLOPS"),
    ("peak_bf16_flops_per_s", 312e3, "GFLOPS"),
    ("peak_bf16_flops_per_s", 312e6, "MFLOPS"),
    ("tdp_w", 0.4, "kW"),
    ("tdp_w", 400e3, "mW"),
    ("idle_w", 72e3, "mW"),
]


@pytest.mark.parametrize(("figure", "value", "_unit"), UNITS)
def test_wrong_units_of_a_device_are_refused(tmp_path, figure, value, _unit):
    assert "unit of its name" in refused(write(tmp_path, {figure: value}))


KERNEL_UNITS = [
    ("memory_efficiency", 69, "percent"),
    ("compute_efficiency", 17.7, "percent"),
    ("launch_s", 15.0, "us"),
    ("launch_s", 0.015, "ms"),
    ("dequantized_weights_per_s", 1160.0, "G/s"),
    ("dequantized_weights_per_s", 1.16e6, "M/s"),
    ("bits", 32, ""),
    ("passes", 0, ""),
]


@pytest.mark.parametrize(("figure", "value", "_unit"), KERNEL_UNITS)
def test_wrong_units_of_a_kernel_are_refused(tmp_path, figure, value, _unit):
    def change(data):
        data["stacks"][0]["kernels"][0][figure] = value

    assert "unit of its name" in refused(write(tmp_path, change))


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        *(("layer_s", 60.0), ("layer_s", 0.06), ("step_s", 1.0), ("sequence_s", 0.0656)),
        *(("tile_rows", 0), ("tile_rows", 4096), ("resident_bits", 4), ("resident_bits", 32)),
        *(("dense_memory_efficiency", 76), ("dense_compute_efficiency", 1.5)),
    ],
)
def test_wrong_units_of_a_stack_are_refused(tmp_path, figure, value):
    def change(data):
        data["stacks"][0][figure] = value

    assert "unit of its name" in refused(write(tmp_path, change))


def test_what_a_runtime_takes_is_memory_that_no_map_has(tmp_path):
    def with_runtime(data):
        data["runtime_bytes"] = 2.5e9
        data["sources"]["runtime_bytes"] = "free -b after boot"

    file = write(tmp_path, with_runtime, "jetson-orin-nano")
    own = load_hardware(str(file))
    plain = load_hardware("jetson-orin-nano")
    args = (OLMOE, MENU, uniform("2", "4"), Workload())
    more = own.cost(*args).memory_bytes - plain.cost(*args).memory_bytes
    np.testing.assert_allclose(more, 2.5e9)
    parts = {part.name: part for part in own.explain(*args[:2], args[2][0], args[3]).parts}
    assert parts["runtime"].stored_bytes == 2.5e9
    assert "neither a source" in refused(
        write(tmp_path, {"runtime_bytes": 2.5e9}, "jetson-orin-nano")
    )

    def too_much(data):
        with_runtime(data)
        data["runtime_bytes"] = 8e9

    assert "not below capacity_bytes" in refused(write(tmp_path, too_much, "jetson-orin-nano"))


def test_a_kilowatt_that_passes_for_watts_is_refused(tmp_path):
    file = write(tmp_path, {"tdp_w": 1.0, "idle_w": 0.07}, "b200")
    assert "operations per joule" in refused(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stored_widths": [8, 4, 16]}, "must rise"),
        ({"stored_widths": [8, 8, 16]}, "must rise"),
        ({"stored_widths": [5, 16]}, "must rise, among"),
        ({"stored_widths": [4, 8]}, "cannot store 16 bits"),
        ({"stored_widths": [8, 16]}, "has a kernel for 2 bits, which it stores as 8"),
        ({"stored_widths": "all"}, "must be a list"),
        ({"assumed": ["launch"]}, "did you mean 'launch_s'|Unknown assumed figure"),
        ({"name": "a/b"}, "without a slash"),
    ],
)
def test_hostile_stacks_are_refused(tmp_path, change, message):
    def edit(data):
        data["stacks"][0].update(change)

    assert re.search(message, refused(write(tmp_path, edit)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["stacks"][0]["kernels"].reverse(), "must rise"),
        (lambda d: d["stacks"][0]["kernels"][0].update(bits=5), "must rise, among"),
        (lambda d: d["stacks"][0]["kernels"][3].update(passes=3), "cannot have 3 passes"),
        (lambda d: d["stacks"][0]["kernels"][0].update(assumed=["speed"]), "Unknown assumed"),
        (lambda d: d["assumed"].append("idle"), "did you mean 'idle_w'"),
        (lambda d: d["sources"].update(bandwidth="x"), "Unknown figure under sources"),
        (lambda d: d.update(name="host"), "machine at hand"),
        (lambda d: d.update(name="CUDA"), "machine at hand"),
        (lambda d: d.update(name="a\nb"), "control codes"),
        (lambda d: d.update(note=7), "must be text"),
        (
            lambda d: d.update(power={"base_w": 401.0, "memory_w": 1.0, "compute_w": 1.0}),
            "above tdp_w",
        ),
    ],
)
def test_hostile_files_are_refused(tmp_path, change, message):
    assert message in refused(write(tmp_path, change))


@given(
    stored=st.sets(st.sampled_from([2, 3, 4, 8])),
    kernels=st.sets(st.sampled_from([2, 3, 4, 8])),
)
def test_a_width_is_stored_and_run_at_the_next_wider_that_there_is(stored, kernels):
    widths = (*sorted(stored), 16)
    runs = [Kernel(b, "bf16", 0.5, 0.5, 0.0, "s") for b in (*sorted(kernels & stored), 16)]
    stack = Stack("s", tuple(runs), 1, 0.5, 0.5, 0.0, 0.0, 0.0, "s", stored_widths=widths)
    for bits in (2, 3, 4, 8, 16):
        kept, run = stack.stored_width(bits), stack.kernel(bits).bits
        assert kept == min(w for w in widths if w >= bits)
        assert run == min(k.bits for k in runs if k.bits >= kept)
        assert bits <= kept <= run


def test_a_file_without_the_newer_fields_means_what_it_did(tmp_path):
    def older(data):
        del data["peaks"], data["note"]
        for stack in data["stacks"]:
            del stack["assumed"]
            for kernel in stack["kernels"]:
                del kernel["assumed"]

    file = write(tmp_path, older, "rtx3060")
    own = load_hardware(str(file)).cost(OLMOE, MENU, uniform("2", "4", "16"), Workload())
    shipped_one = costs("rtx3060", "2", "4", "16")
    assert (own.latency_s == shipped_one.latency_s).all()
    assert (own.memory_bytes == shipped_one.memory_bytes).all()
