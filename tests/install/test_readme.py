"""Runs every snippet of every README as it is printed, in an environment with only the packages that its text installs.

The environments link to the packages of the tests. Nothing is installed in them, so extras that the text does not name
are missing.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).parent.parent.parent
READMES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *ROOT.glob("*/README.md")])
ALL = [(readme, snippet) for readme in READMES for snippet in snippets.snippets(ROOT / readme)]
#: Snippets that do not run here, with the reason.
NOT_RUN = {
    "bin/dsa-tvm demo": "test_install.py runs it",
    "bin/pytest": ".ci/run runs it",
    "tune --measure": "needs a GPU",
}
#: Blocks that do nothing.
SHOWN = ("", "json")


#: Servers. They run until the last snippet of their file has ended.
SERVERS = ("tvm.exec.rpc_tracker", "tvm.exec.rpc_server")


class Places:
    """Makes a checkout, the tools of a C developer, and an environment for each extra."""

    def __init__(self, top):
        self.top, self.checkout, self.tools = top, top / "check out", top / "tools"
        shutil.copytree(ROOT, self.checkout, ignore=snippets.ignored(ROOT))
        self.elsewhere = top / "elsewhere"
        for directory in (self.tools, self.elsewhere):
            directory.mkdir()
        for name, module in (("cmake", "cmake"), ("pkg-config", "pkgconf")):
            snippets.write_command(self.tools / name, f'exec "{sys.executable}" -m {module} "$@"')
        self.made = {}

    def of(self, extra, language="sh", others=()):
        if (extra, others) not in self.made:
            directory = self.top / " ".join(["with", extra or "nothing", *others])
            self.made[extra, others] = snippets.environment(directory, f"dsa_tvm[{extra}]", *others)
        directory = self.elsewhere if language == "python" else self.checkout
        return snippets.Place(self.made[extra, others], self.tools, directory)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return Places(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def servers():
    with ExitStack() as running:
        yield running


@pytest.mark.parametrize(("readme", "snippet"), ALL, ids=lambda x: str(x) if isinstance(x, Path) else f"L{x.line}")
def test_snippet(readme, snippet, places, servers):
    if snippet.language in SHOWN:
        return
    for words, reason in NOT_RUN.items():
        if words in snippet.text:
            pytest.skip(reason)
    needs_nvcc = "--target sm_90a" in snippet.text or "--target cuda" in snippet.text
    if needs_nvcc:
        if not shutil.which("nvcc"):
            pytest.skip("needs nvcc")
        snippets.write_command(places.tools / "nvcc", f'exec "{shutil.which("nvcc")}" "$@"')
    if snippet.language == "cmake":
        (places.checkout / "CMakeLists.txt").write_text(snippet.text)
        assert snippet.text.startswith("# CMakeLists.txt\n")
        return
    assert snippet.extra is not None, f"{readme}:{snippet.line}: the section names no pip install"
    place = places.of(snippet.extra, snippet.language, snippet.others)
    if any(name in snippet.text for name in SERVERS):
        servers.enter_context(place.started(snippet))
        return
    said = place.run(snippet, seconds=1800 if needs_nvcc else 600)
    if "./embed" in snippet.text:
        assert said.endswith("ok\n")


@pytest.mark.parametrize(
    ("extra", "missing"), [("", "onnx"), ("onnx", "torch"), ("torch", "tvm"), ("tune", "onnxruntime")]
)
def test_an_environment_has_only_what_was_named(places, extra, missing):
    probe = snippets.Snippet("", "python", f"import dsa_tvm, {missing}", extra, 0)
    with pytest.raises(AssertionError, match=f"No module named '{missing}'"):
        places.of(extra, probe.language).run(probe, seconds=60)
