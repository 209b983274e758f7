"""Caches that do not fit are refused, with numbers, before they are allocated."""

import re
from types import SimpleNamespace

import pytest
import torch

import toca_kernels as toca
from models import sample, timesteps, tiny_dit
from offloading import StandIn, offloaded
from pipelines import PIPELINES
from test_families import STEPS, config
from toca_kernels import room
from toca_kernels.apps.drawing.batches import Drawer
from toca_kernels.cache import TokenCache

CONFIG = toca.ToCaConfig(interval=3, fresh_ratio=0.3)


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free."""
    bytes_of = {"meta": None}  # where estimates are made
    monkeypatch.setattr(room, "free_bytes", lambda device: bytes_of[device.type])

    def say(count):
        bytes_of["cpu"] = count

    return say


def held(session):
    """Bytes of all caches that the session's branches hold."""
    branches = session._run.branches.values()
    return sum(branch.cache.nbytes for branch in branches if branch.cache is not None)


def test_the_step_is_refused_after_its_first_block(free):
    model = tiny_dit()
    untouched = sample(model, STEPS)
    needed = CONFIG.memory(model, batch=4, tokens=64).cache_bytes
    calls = []
    handles = [
        block.register_forward_hook(lambda *_, n=n: calls.append(n))
        for n, block in enumerate(model.blocks)
    ]
    with toca.enabled(model, CONFIG, timesteps=timesteps(STEPS)) as session:
        free(needed // 2)
        with pytest.raises(torch.OutOfMemoryError, match="caches of one guidance branch") as raised:
            sample(model, STEPS)
        error = raised.value
        assert isinstance(error, toca.CacheTooLarge)
        assert calls == [0]
        assert error.free == needed // 2
        assert error.missing == needed * 2 // 3  # of three layers one is there
        assert needed < error.needed < 1.1 * needed
        assert held(session) == 0
        free(2 * needed)
        first = sample(model, STEPS)
        assert session.summary().cache_bytes == needed
        free(0)  # what an earlier run has shown is refused before the first block
        calls.clear()
        with pytest.raises(toca.CacheTooLarge):
            sample(model, STEPS)
        assert calls == []
        free(2 * needed)
        assert torch.equal(sample(model, STEPS), first)
    for handle in handles:
        handle.remove()
    assert torch.equal(sample(model, STEPS), untouched)


def sizes(message):
    """What the refusal says that other settings would take."""
    found = re.findall(r"(\d+)  with (.*?)(?: of \d+: fits)?\n", message)
    return {said: int(size) for size, said in found}


@pytest.mark.parametrize("name", ["wan", "sd3", "flux", "hunyuan_video", "latte", "cogvideox"])
def test_what_would_help_is_computed(free, name, monkeypatch):
    """What `memory` tells of these settings."""
    monkeypatch.setattr(room, "readable", str)
    tiny = PIPELINES[name]
    pipe = tiny()
    untouched = tiny.call(pipe, STEPS)
    chosen = config(name)
    arguments = {"batch": len(tiny.calls[0]), "tokens": tiny.grid, "text_tokens": tiny.text}
    model = tiny.models(pipe)[0]
    whole = chosen.memory(model, **arguments).cache_bytes
    with toca.enabled(pipe, chosen) as session:
        free(whole // 5)
        with pytest.raises(toca.CacheTooLarge) as raised:
            tiny.call(pipe, STEPS)
        assert held(session) == 0
    assert torch.equal(tiny.call(pipe, STEPS), untouched)
    said = str(raised.value)
    assert re.search(rf"\d+ needed for .*attn.* {whole // 5} free on cpu", said)
    told = sizes(said)
    assert "cache_dtype='int8'" in told
    alone = {"modules=('attn',)", "modules=('mlp',)"} & told.keys()
    assert len(alone) == (0 if name in ("flux", "hunyuan_video") else 2)  # together in a block
    if name == "wan":
        assert {"modules=('cross_attn',)", "cache_dtype='int8', layers=range(2)"} <= told.keys()
    for setting, size in told.items():
        other = chosen.replace(**eval(f"dict({setting})"))
        estimate = other.memory(model, **arguments)
        # Scores are in it, the selection of a step is not.
        assert estimate.cache_bytes <= size <= estimate.cache_bytes + estimate.other_bytes


def test_other_settings_that_would_do_are_allowed(free):
    """Where attention and MLP of a block go together, only one of them is not offered."""
    pipe = PIPELINES["flux"]()
    with toca.enabled(pipe, config("flux")) as session:
        run = session._run
        assert not run.allows(run.config.replace(modules=("attn",)))
        assert run.allows(run.config.replace(modules=("attn", "single_mlp")))
        assert all(block.never == frozenset() for block in run.blocks)


def test_a_second_guidance_branch_is_refused(free):
    """Its caches are made at once, from what the first has shown; then the run goes on."""
    tiny = PIPELINES["wan"]
    pipe = tiny()
    chosen = config("wan")
    arguments = {"batch": 1, "tokens": tiny.grid, "text_tokens": tiny.text}
    needed = chosen.memory(tiny.models(pipe)[0], **arguments).cache_bytes
    with toca.enabled(pipe, chosen) as session:
        answers = iter([10 * needed] * 6 + [needed // 2] * 100)

        def free_bytes(device):
            return next(answers)  # one for each check

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(room, "free_bytes", free_bytes)
            with pytest.raises(toca.CacheTooLarge):
                tiny.call(pipe, STEPS)
        free(10 * needed)
        out = tiny.call(pipe, STEPS)
        assert session.summary().cache_bytes == 2 * needed
        assert torch.equal(tiny.call(pipe, STEPS), out)


def test_sampling_halves_its_batch(free, capsys):
    model = tiny_dit()
    one = CONFIG.memory(model, batch=2, tokens=64)
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        free(one.cache_bytes + one.other_bytes)

        def draw(requests):
            return sample(model, STEPS, labels=[int(request) for request in requests])

        drawn, parts = Drawer(draw, session.reset, 4)([3, 7, 5, 1])
    assert parts == [1, 1, 1, 1]
    assert len(drawn) == 4
    assert "out of memory with 4 samples at once, going on with 2" in capsys.readouterr().err


@pytest.fixture
def free_apart(monkeypatch):
    """Sets how many bytes are free on the device, and on the host."""
    left = SimpleNamespace(device=None, host=None)
    monkeypatch.setattr(room, "free_bytes", lambda device: left.device)
    monkeypatch.setattr(room, "free_on_host", lambda: left.host)
    return left


def test_the_host_must_hold_the_caches(free_apart):
    model = tiny_dit()
    needed = CONFIG.memory(model, batch=4, tokens=64).cache_bytes
    with offloaded(model, CONFIG, num_steps=STEPS) as session:
        free_apart.host = needed // 2
        with pytest.raises(toca.CacheTooLarge, match=r"free on the host\. It would take") as raised:
            sample(model, STEPS)
        assert raised.value.free == needed // 2
        assert raised.value.missing >= needed * 2 // 3  # of three layers one is there
        assert "cache_dtype='int8'" in str(raised.value)
        assert "cache_device" not in str(raised.value)
        assert held(session) == 0
        free_apart.host = 3 * needed
        first = sample(model, STEPS)
        free_apart.host = 0
        with pytest.raises(toca.CacheTooLarge, match="on the host"):
            sample(model, STEPS)
        free_apart.host = None
        assert torch.equal(sample(model, STEPS), first)


def test_the_device_must_hold_two_blocks(free_apart):
    model = tiny_dit()
    chosen = CONFIG.replace(cache_device="cpu")
    told = chosen.memory(model, batch=4, tokens=64, device="cuda")
    copies = StandIn()
    with offloaded(model, CONFIG, copies, num_steps=STEPS) as session:
        free_apart.device = told.working_bytes // 4
        with pytest.raises(
            toca.CacheTooLarge, match="working buffers for the caches of two blocks"
        ):
            sample(model, STEPS)
        assert session._run.loan.nbytes == 0
        free_apart.device = told.working_bytes // 2
        sample(model, STEPS)  # in the second block the first one's are there
        with pytest.raises(toca.CacheTooLarge) as raised:
            sample(model, STEPS)  # all of it is still to come
        assert raised.value.needed >= told.working_bytes
        free_apart.device = told.working_bytes + told.other_bytes
        sample(model, STEPS)


def test_a_device_that_is_too_small_is_told_of_the_host(monkeypatch):
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS) as session:
        sample(model, STEPS)
        run = session._run
        (layouts,) = run._layouts.values()
        cache = TokenCache(run.kept_layers, torch.device("cpu"), keeps=run.keeps)
        cache.see(layouts)
        cuda = torch.device("cuda", 0)
        monkeypatch.setattr(room, "free_bytes", lambda device: 1)
        monkeypatch.setattr(room, "readable", str)
        offered = r"(\d+)  with cache_device='cpu', the caches in host memory"
        with pytest.raises(toca.CacheTooLarge, match=offered) as raised:
            room.require(run, cache, cuda)
        told = CONFIG.replace(cache_device="cpu").memory(model, batch=4, tokens=64, device=cuda)
        assert int(re.search(offered, str(raised.value))[1]) == told.working_bytes
        with pytest.raises(toca.CacheTooLarge) as raised:
            room.require(run, cache, torch.device("cpu"))
        assert "cache_device" not in str(raised.value)
        run.graphs = object()  # which cannot be had together
        with pytest.raises(toca.CacheTooLarge) as raised:
            room.require(run, cache, cuda)
        assert "cache_device" not in str(raised.value)


def test_what_is_free():
    """On a CPU what Linux says; nothing is refused where nobody tells."""
    assert room.free_bytes(torch.device("meta")) is None
    if room._MEMINFO.exists():
        assert 2**20 < room.free_bytes(torch.device("cpu")) < 2**50


def test_no_check_where_nobody_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "none")
    assert room.free_bytes(torch.device("cpu")) is None
    model = tiny_dit()
    with toca.enabled(model, CONFIG, num_steps=STEPS):
        sample(model, STEPS)


GIB = 2**30


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Sets what Linux has available and the control groups that the process is in."""
    top = tmp_path / "sys"
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_OWN_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(room, "_CGROUPS", top)
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 * 2**20} kB\n")

    def say(own, **files):
        """Files of a group by the path to it, `_` for a slash."""
        (tmp_path / "cgroup").write_text(own)
        for name, contents in files.items():
            folder = top / name.strip("_").replace("_", "/")
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in contents.items():
                (folder / file).write_text(f"{text}\n")
        return room.free_bytes(torch.device("cpu"))

    return say


def second(most, used, inactive=0):
    """A group of version 2."""
    return {
        "memory.max": most,
        "memory.current": used,
        "memory.stat": f"anon 7\ninactive_file {inactive}\nactive_file 9",
    }


def first(most, used, inactive=0):
    """A group of version 1."""
    return {
        "memory.limit_in_bytes": most,
        "memory.usage_in_bytes": used,
        "memory.stat": f"inactive_file 5\ntotal_inactive_file {inactive}",
    }


def test_without_control_groups_linux_alone_is_asked(groups, tmp_path):
    assert room.free_bytes(torch.device("cpu")) == 64 * GIB
    assert groups("0::/\n") == 64 * GIB  # a root without limits
    assert groups("0::/a\n", a=second("max", 5 * GIB)) == 64 * GIB
    assert groups("0::/a\n", a={"memory.max": "no number"}) == 64 * GIB


def test_a_containers_limit_counts(groups):
    # In a namespace of its own a container is at the top.
    assert groups("0::/\n", _=second(8 * GIB, 3 * GIB, GIB)) == 6 * GIB
    assert groups("0::/\n", _=second(8 * GIB, 9 * GIB)) == 0
    assert groups("0::/\n", _=second(200 * GIB, GIB)) == 64 * GIB


def test_the_tightest_group_above_the_process_counts(groups):
    free = groups(
        "0::/job/step/task\n",
        job=second(20 * GIB, 4 * GIB),
        job_step=second(12 * GIB, 3 * GIB, 2 * GIB),
        job_step_task=second("max", GIB),
        other=second(GIB, 0),
    )
    assert free == 11 * GIB


def test_groups_of_version_1(groups):
    own = "12:cpu,cpuacct:/job\n4:memory:/job/task\n0::/\n"
    free = groups(
        own,
        memory=first(2**63 - 4096, 30 * GIB),
        memory_job=first(10 * GIB, 4 * GIB, GIB),
        memory_job_task=first(2**63 - 4096, GIB),
        cpu_job=first(1, 0),
    )
    assert free == 7 * GIB
    # Without a namespace a container's path is not there, its own group is the top.
    assert groups("4:memory:/docker/0123\n", memory=first(5 * GIB, 2 * GIB)) == 3 * GIB


def test_pinned_memory_that_torch_keeps_is_free(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    assert room.free_on_host() == 1000
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    kept = {"allocated_bytes.current": 700, "active_bytes.current": 500}
    monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: kept)
    assert room.free_on_host() == 1200
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    assert room.free_on_host() is None


def test_what_is_free_on_a_gpu(monkeypatch):
    """What the driver has, and what the allocator has reserved and does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert room.free_bytes(torch.device("cuda", 0)) == 1200
