"""Test classes to inherit: what passes them fits in; and a driver for machines without a GPU."""

from dmpq.testing.nvml import FakeClock, FakeGpu, FakeNvml, fake_nvml

__all__ = ["FakeClock", "FakeGpu", "FakeNvml", "fake_nvml"]
