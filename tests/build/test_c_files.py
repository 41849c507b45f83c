"""C files use each other in one direction only."""

from __future__ import annotations

import shutil
import subprocess
from graphlib import TopologicalSorter

import pytest

pytest.importorskip("tvm", reason="the build makes the tables of the operators")

from dsa_tvm.build import link, spec_table
from dsa_tvm.spec import DIMS

pytestmark = pytest.mark.skipif(not (shutil.which("cc") and shutil.which("nm")), reason="there is no C compiler")

#: The generated table of a library with CUDA kernels, here without any stage.
NO_STAGES = "".join(
    f"#define dsa_shape_{stage}(call) NULL\n#define dsa_launch_{stage}(call, ...) dsa_cuda_unserved(call)\n"
    for stage in (
        *("lightning_indexer_many", "lightning_indexer_few", "topk_rows", "topk_parts", "topk_merge"),
        *("sparse_mla_attend", "sparse_mla_combine", "sparse_mla_fp8_attend", "sparse_mla_fp8_combine"),
        *("write_rows_copy", "write_rows_write"),
    )
)


def symbols(path, *options):
    return set(subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout.split())


def test_no_circle(tmp_path):
    """Of any two files, at most one uses symbols of the other, directly or indirectly."""
    spec_table.write(tmp_path, DIMS, "0")
    (tmp_path / "cuda_launch.h").write_text(NO_STAGES)
    source = link.export_directory() / "src"
    files = sorted(path for path in source.rglob("*.c") if path.parent.name != "measure" and path.name != "none.c")
    assert len(files) > 15
    defined, used = {}, {}
    for i, path in enumerate(files):
        out = tmp_path / f"{i}.o"
        link.run(["cc", "-O0", *link.flags(tmp_path), "-c", str(path), "-o", str(out)])
        name = str(path.relative_to(source))
        defined |= dict.fromkeys(symbols(out, "-j", "--defined-only", "--extern-only"), name)
        used[name] = symbols(out, "-j", "--undefined-only")
    graph = {name: {defined[s] for s in found if s in defined} - {name} for name, found in used.items()}
    assert sum(map(len, graph.values())) > 20
    # This raises a CycleError that names the files.
    list(TopologicalSorter(graph).static_order())
