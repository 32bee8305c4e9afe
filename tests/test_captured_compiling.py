"""Inductor's folder of compiled graphs; the error without a compiler; oneDNN's products."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

from pvae import captured
from pvae.captured import compiling
from pvae.captured.compiling import _without_cuda_home, _without_log1p
from pvae.captured.products import amd_family_in, by_onednn

PROCESS = """
import json, os, sys
import torch, pvae
from pathlib import Path
from pvae import captured
from pyro.infer import Trace_ELBO
from torch._dynamo.utils import counters

torch.manual_seed(0)
vae = pvae.build((1, 8, 8), 2, sys.argv[1], hidden=16)
x = (torch.rand(6, 1, 8, 8) > 0.5).float()
optim = pvae.SingleOptimizer(torch.optim.Adam(vae.parameters()))
svi = captured.SVI(vae.model, vae.guide, optim, Trace_ELBO(), strict=True)
losses = [svi.step(x) for _ in range(4)]
children = Path(f"/proc/self/task/{os.getpid()}/children")
print(json.dumps({
    "engine": svi.engine,
    "losses": losses,
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "loaded whole": counters["aot_autograd"]["autograd_cache_hit"],
    "children": children.read_text() if children.exists() else "",
}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder in which inductor keeps its code during this test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    return tmp_path


def process(folder: Path, net: str) -> tuple[dict, str]:
    """Trains four steps in a new process; returns its report and its stderr."""
    # CUDA_HOME without a GPU: torch would print a line about it
    settings = {"TORCHINDUCTOR_CACHE_DIR": folder, "CUDA_HOME": folder, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", PROCESS, net],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout), ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_a_second_process_compiles_nothing(net, tmp_path):
    first, said = process(tmp_path, net)
    assert (first["engine"], first["misses"], first["hits"]) == ("captured", 1, 0)
    second, said_again = process(tmp_path, net)
    assert (second["engine"], second["misses"], second["hits"]) == ("captured", 0, 1)
    assert (first["loaded whole"], second["loaded whole"]) == (0, 1)  # nor does it trace again
    assert second["losses"] == first["losses"]
    assert said == said_again == ""  # torch's line about CUDA is not printed
    assert first["children"] == second["children"] == ""  # no pool of compiler processes is left


def times(number):
    return lambda x: (x.exp() * number,)


def plus(*numbers):
    return lambda x: (x.exp() + torch.tensor(numbers).squeeze(),)


# each graph differs from the first in one property
GRAPHS = {
    "first": (times(2.0), (4, 6), torch.float32, False),
    "number": (times(3.0), (4, 6), torch.float32, False),
    "shape": (times(2.0), (6, 4), torch.float32, False),
    "size": (times(2.0), (4, 7), torch.float32, False),
    "dtype": (times(2.0), (4, 6), torch.float64, False),
    "stride": (times(2.0), (4, 6), torch.float32, True),
    "constant": (plus(1.0, 2.0), (4, 2), torch.float32, False),
    "other constant": (plus(1.0, 3.0), (4, 2), torch.float32, False),  # same code as "constant"
    "single constant": (plus(2.0), (4, 6), torch.float32, False),
    "other single constant": (plus(3.0), (4, 6), torch.float32, False),
}


@pytest.mark.slow
def test_graphs_that_differ_are_not_mixed_up(folder):
    compiled = []
    for _ in range(2):
        counters.clear()
        for name, (function, shape, dtype, transposed) in GRAPHS.items():
            x = torch.rand(shape[::-1] if transposed else shape, dtype=dtype)
            x = x.t() if transposed else x
            graph = make_fx(function, tracing_mode="fake")(x)
            (ours,), (theirs,) = captured.inductor(graph, [x])(x), function(x)
            assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride()), name
            torch.testing.assert_close(ours, theirs)
        compiled.append(counters["inductor"]["fxgraph_cache_miss"])
        hits = counters["inductor"]["fxgraph_cache_hit"]
        assert compiled[-1] + hits == len(GRAPHS)
    assert compiled == [len(GRAPHS) - 2, 0]


@pytest.mark.slow
def test_code_for_another_number_of_threads_is_not_loaded(folder):
    before, x = torch.get_num_threads(), torch.rand(4, 6)
    try:
        for threads, already in ((1, False), (2, False), (1, True)):
            counters.clear()
            torch.set_num_threads(threads)
            captured.inductor(make_fx(times(2.0), tracing_mode="fake")(x), [x])
            assert counters["inductor"]["fxgraph_cache_hit"] == already
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_code_for_another_processor_is_not_loaded(folder, monkeypatch):
    x = torch.rand(4, 6)
    for processor, already in (("AVX512", False), ("AVX2", False), ("AVX512", True)):
        counters.clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda p=processor: p)
        captured.inductor(make_fx(times(2.0), tracing_mode="fake")(x), [x])
        assert counters["inductor"]["fxgraph_cache_hit"] == already


@pytest.mark.slow
def test_what_a_graph_writes_in_place_is_written_by_one_that_is_loaded(folder):
    for already in (False, True):
        ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        x = torch.rand(5, 3)

        def function(mean, var, x):
            return (nn.functional.batch_norm(x, mean, var, training=True),)

        values = [ours.running_mean, ours.running_var, x]
        graph = make_fx(function, tracing_mode="fake")(*values)
        (by_graph,) = captured.inductor(graph, values)(*values)
        torch.testing.assert_close(by_graph, theirs(x).detach())
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert counters["inductor"]["fxgraph_cache_hit"] == already


def test_without_a_cpp_compiler_the_reason_is_plain(folder):
    # patched, because inductor reads the variable CXX only when it is imported
    function = captured.Function(lambda x: x.exp() * 2)
    x = torch.rand(3)
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        function(x)
        with pytest.warns(
            UserWarning,
            match=r"^captured.Function runs eager: a C\+\+ compiler \(g\+\+\) is needed",
        ):
            torch.testing.assert_close(function(x), x.exp() * 2)
    assert function.engine == "eager"
    assert function.reason.endswith("and none was found")


def test_the_line_about_cuda_is_the_only_one_that_is_not_said():
    said: list[str] = []
    logger = logging.getLogger("torch.utils.cpp_extension")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        with _without_cuda_home():
            logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/cuda")
            logger.warning("another line")
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/cuda")
    finally:
        logger.removeHandler(handler)
    assert said == ["another line", "No CUDA runtime is found, using CUDA_HOME='/cuda'"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_density_of_binary_pixels_has_all_digits_without_log1p(dtype):
    logits = torch.cat([torch.linspace(-120, 120, 20_001), torch.tensor([0.0, torch.nan])])
    logits = logits.to(dtype)
    for x in (torch.zeros_like(logits), torch.ones_like(logits)):
        graph = make_fx(lambda logits, x: nn.BCEWithLogitsLoss(reduction="none")(logits, x))(
            logits, x
        )
        _without_log1p(graph)
        assert "binary_cross_entropy" not in graph.code
        wide, share = logits.double(), 1 - x.double()
        expected = share * wide - wide.clamp(max=0) + (-wide.abs()).exp().log1p()
        near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).tiny}
        torch.testing.assert_close(graph(logits, x).double(), expected, **near, equal_nan=True)


def test_a_weighted_density_keeps_log1p():
    loss = nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 3.0]))
    graph = make_fx(loss)(torch.ones(5, 2), torch.ones(5, 2))
    before = graph.code
    _without_log1p(graph)
    assert graph.code == before


def layer(x, w, b, g):
    """Returns a linear layer, the gradients of its input and weight, and a small product."""
    return torch.addmm(b, x, w.t()), torch.mm(g, w), torch.mm(g.t(), x), torch.mm(x[:4], w.t())


def of_layer(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, 784), (400, 784), (400,), (128, 400))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def taken(graph):
    """Returns, for each matrix product of the graph, whether it is oneDNN's."""
    products = [n.target for n in graph.graph.nodes if n.name.startswith(("mm", "addmm"))]
    return [target is torch.ops.pvae.product.default for target in products]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (26, [True, True, True, False]),
        (25, [False] * 4),
        (None, [False] * 4),
    ],
)
def test_the_processor_decides_which_products_are_onednns_and_all_are_right(family, expected):
    given = of_layer()
    graph = make_fx(layer, tracing_mode="fake")(*given)
    before = graph(*given)
    by_onednn(graph, family)
    assert taken(graph) == expected
    for ours, theirs, exact in zip(
        graph(*given), before, layer(*(t.double() for t in given)), strict=True
    ):
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        assert (ours - exact).norm() <= 1e-6 * exact.norm()


def scaled(x, w, b, g):
    return torch.addmm(b, x, w.t(), beta=2), torch.addmm(g, x, w.t())


def test_what_onednn_would_compute_otherwise_stays_torchs():
    wide = make_fx(layer, tracing_mode="fake")(*of_layer(torch.float64))
    by_onednn(wide, 26)
    assert not any(taken(wide))
    narrow = make_fx(layer, tracing_mode="fake")(*of_layer(torch.bfloat16))
    by_onednn(narrow, 26)
    assert not any(taken(narrow))
    other = make_fx(scaled, tracing_mode="fake")(*of_layer())  # another factor, another bias
    by_onednn(other, 26)
    assert not any(taken(other))


def test_below_full_precision_and_without_onednn_products_stay_torchs():
    graph = make_fx(layer, tracing_mode="fake")(*of_layer())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        by_onednn(graph, 26)
    finally:
        torch.set_float32_matmul_precision(before)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        by_onednn(graph, 26)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert not any(taken(graph))


def test_which_processors_products_are_measured_for():
    said = "vendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\nflags\t\t: fma avx2 {}\n"
    assert amd_family_in(said.format("AuthenticAMD", 26, "avx512f avx512dq")) == 26
    assert amd_family_in(said.format("AuthenticAMD", 25, "sha_ni")) is None  # Zen 3
    assert amd_family_in(said.format("GenuineIntel", 6, "avx512f avx512dq")) is None
    assert amd_family_in("processor\t: 0\nCPU implementer\t: 0x41\n") is None


@pytest.mark.slow
def test_products_of_onednn_are_compiled_once(folder, monkeypatch):
    monkeypatch.setattr(compiling, "amd_family", lambda: 26)
    given = of_layer()
    for already in (False, True):
        counters.clear()
        graph = make_fx(layer, tracing_mode="fake")(*given)
        results = captured.inductor(graph, given)(*given)
        assert taken(graph) == [True, True, True, False]
        assert counters["aot_autograd"]["autograd_cache_hit"] == already
        for ours, theirs in zip(results, layer(*given), strict=True):
            assert ours.stride() == theirs.stride()
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        assert counters["inductor"]["fxgraph_cache_hit"] == already
