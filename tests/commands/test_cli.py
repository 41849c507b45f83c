"""What ``dsa-tvm`` prints and what it refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

import dsa_tvm
from dsa_tvm import cli as command
from dsa_tvm import env, records


def cli(*arguments, **kwargs):
    return subprocess.run([sys.executable, "-m", "dsa_tvm.cli", *arguments], capture_output=True, text=True, **kwargs)


def test_env():
    text, document = cli("env"), cli("env", "--json")
    report = json.loads(document.stdout)
    assert report["library"]["target in use"] == dsa_tvm.active_target()
    assert report["packages"]["numpy"] and "target in use: " in text.stdout


def test_extras_in_messages_exist():
    """Every extra that an error tells users to install is one of pyproject.toml."""
    sources = [path.read_text() for path in Path(dsa_tvm.__file__).parent.rglob("*.py")]
    found = {name for text in sources for name in re.findall(r"dsa_tvm\[(\w+)\]", text)}
    calls = [node for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    found |= {call.args[1].value for call in calls if getattr(call.func, "id", "") == "expect_installed"}
    assert {"build", "tune", "plot", "onnx"} <= found <= set(metadata("dsa_tvm").get_all("Provides-Extra"))


def test_env_needs_the_standard_library_only():
    """It reports values, not exceptions, even without site-packages and without a library."""
    package = Path(dsa_tvm.__file__).parent.parent
    code = f"import sys; sys.path.append({str(package)!r}); from dsa_tvm import env; print(env.report()['library'])"
    done = cli_code(code, DSA_TVM_LIBRARY="/nowhere/libdsa_tvm.so")
    assert done.stdout.startswith("failed: "), done.stderr


def cli_code(code, **environment):
    return subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, env=environment)


def test_env_never_raises(monkeypatch):
    def broken():
        raise OSError("no /proc here")

    monkeypatch.setattr(env, "_cpu", broken)
    assert env.report()["cpu"] == "failed: OSError: no /proc here"


ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd asimddp bf16 sve
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: {variant}
CPU part\t: {part}
CPU revision\t: 1

"""


def test_arm_cores_have_names(tmp_path, monkeypatch):
    """Names tell cores and boards apart, so that records of other CPUs do not pass for those of this one."""
    monkeypatch.setattr(env, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(env, "_BOARDS", (tmp_path / "none", tmp_path / "model"))

    def name(*cores, board=""):
        text = "".join(ARM.format(part=part, variant=variant) for part, variant in cores)
        (tmp_path / "cpuinfo").write_text(text)
        (tmp_path / "model").write_text(board)
        return env.cpu_model()

    names = [
        name(("0xd0c", "0x3")),
        name(("0xd40", "0x1")),
        name(("0xd40", "0x2")),
        name(("0xd03", "0x1"), ("0xd08", "0x1")),
        name(("0xd08", "0x1"), board="Raspberry Pi 4 Model B Rev 1.4\0"),
        name(("0xd08", "0x1"), board="Some other board"),
        name(),
    ]
    assert len(set(names)) == len(names)
    assert all(n.isprintable() and n != "unknown" for n in names), names
    assert "implementer 0x41" in names[0] and "part 0xd0c" in names[0]
    assert "0xd03/0xd08" in names[3] and "Raspberry Pi 4 Model B Rev 1.4" in names[4]
    name(("0xd0c", "0x3"))
    assert env.report()["cpu"]["features"] == ["asimd", "asimddp", "bf16", "sve"]


def test_config():
    paths = [Path(line) for line in cli("config", "--cmakedir", "--includedir", "--library").stdout.splitlines()]
    assert (paths[0] / "dsa_tvm-config.cmake").is_file()
    assert (paths[1] / "dsa_tvm" / "dsa_tvm.h").is_file() and paths[2].is_file()
    assert cli("config", "--libs").stdout.split()[-2:] == ["-ldsa_tvm", "-lm"]


def test_config_quotes_flags_for_a_shell(tmp_path):
    """Flags keep odd paths intact. -Wl would split at a comma, and a relative path would mean another folder later."""
    lib = tmp_path / "a b's, c"
    lib.mkdir()
    shutil.copy(dsa_tvm.get_library_path(), lib)
    answers = {}
    for path in (lib / "libdsa_tvm.so", Path(lib.name, "libdsa_tvm.so")):
        environment = os.environ | {"DSA_TVM_LIBRARY": str(path), "PYTHONSAFEPATH": "1"}
        done = cli("config", "--libdir", "--libs", env=environment, cwd=tmp_path)
        libdir, libs = done.stdout.splitlines()
        assert libdir == str(lib)
        assert shlex.split(libs) == [f"-L{lib}", "-Wl,-rpath", "-Xlinker", str(lib), "-ldsa_tvm", "-lm"]
        answers[path] = done.stdout
    assert len(set(answers.values())) == 1


def test_config_says_what_is_missing(tmp_path):
    done = cli("config", "--library", env=os.environ | {"DSA_TVM_LIBRARY": str(tmp_path / "nowhere.so")})
    assert done.returncode == 1 and "config: expected" in done.stderr and not done.stdout


def test_usage():
    assert cli().returncode == 2 and "COMMAND" in cli().stderr
    assert cli("--version").stdout.split() == ["dsa-tvm", dsa_tvm.__version__]


def test_errors_are_one_line():
    done = cli("env", "--nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr


COMMAND = [sys.executable, "-m", "dsa_tvm.cli"]


def through(shell, **environment):
    """Runs a command line in a shell; `$dsa` is the command."""
    whole = os.environ | environment
    shell = shell.replace("$dsa", shlex.join(COMMAND))
    # Otherwise argparse would get the error and hide it.
    whole.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(["bash", "-c", f"set -o pipefail; {shell}"], capture_output=True, env=whole)


@pytest.mark.parametrize("arguments", ["records best", "env", "records show", "--help", "config"])
def test_nobody_reads(arguments):
    """As for other commands, there is no traceback, not even at exit, and the status tells the signal."""
    done = through(f"$dsa {arguments} | (exec 0<&-)")
    assert done.returncode in (0, 141) and not done.stderr  # 0 where all had been written before
    assert through("$dsa records show | head -1").stdout.count(b"\n") == 1
    long = through(f"{{ sleep 1; $dsa {arguments}; }} | (exec 0<&-)")
    assert long.returncode == 141 and not long.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_standard_output():
    done = through("$dsa env > /dev/full")
    assert done.returncode == 1
    assert done.stderr == b"dsa-tvm: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    done = through(f"$dsa env {closed}")
    assert done.returncode == 0 and b"Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_standard_output_cannot_encode(tmp_path, encoding):
    """The bytes of a file name that is not valid text are printed unchanged."""
    name = b"\xff\xe9\xe2\x82\xac"  # the last three are a euro sign
    directory = os.fsencode(tmp_path) + b"/" + name
    os.makedirs(directory + b"/x86-64-v3")
    Path(os.fsdecode(directory + b"/x86-64-v3/topk.jsonl")).write_text("damaged\n")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, "records", "verify", directory], capture_output=True, env=environment)
    assert done.returncode == 1 and b"Traceback" not in done.stderr, done.stderr
    assert b"\xff\xe9" + (b"\xe2\x82\xac" if encoding == "utf-8" else b"\\u20ac") in done.stdout
    for arguments in (["demo", directory + b"/none"], ["records", "best", directory + b"/none"]):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, env=environment)
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["build", "--out", "OUT"], "tvm", "build"),
        (["tune", "topk", "--output", "OUT"], "tvm", "tune"),
        (["tune", "topk", "--output", "OUT"], "xgboost", "tune"),
        (["tune", "topk", "--output", "OUT", "--target", "sm_90a", "--build-only", "OUT"], "tvm", "tune"),
        (["demo"], "onnxruntime", "onnx"),
    ],
)
def test_without_its_extra(tmp_path, capsys, monkeypatch, arguments, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    assert command.main([str(tmp_path) if a == "OUT" else a for a in arguments]) == 1
    said = capsys.readouterr().err
    assert re.search(rf"expected {missing} to be installed, got none; pip install 'dsa_tvm\[{extra}\]'", said), said


@pytest.mark.parametrize("out", ["/proc/none", "{file}", "{file}/below"])
def test_build_says_at_once_that_it_cannot_write(tmp_path, out):
    (tmp_path / "file").touch()
    done = cli("build", "--out", out.format(file=tmp_path / "file"))
    assert done.returncode == 1 and done.stderr.startswith("dsa-tvm: out: expected a directory to write to, got "), done
    assert done.stderr.count("\n") == 1


def test_build_says_at_once_that_the_disk_is_full(small_disk):
    disk = small_disk(4)
    (disk / "filler").write_bytes(bytes(4096))
    done = cli("build", "--out", str(disk))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr
    assert os.listdir(disk) == ["filler"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--d-qk", "640"], "d_qk: expected a value that CUDA kernels serve, got 640"),
        (["--d-idx", "1024"], "d_idx: expected a value that CUDA kernels serve, got 1024"),
    ],
)
def test_build_refuses_what_cuda_kernels_do_not_serve(tmp_path, arguments, message):
    pytest.importorskip("tvm", reason="building needs apache-tvm")
    # Refused before any compiler runs.
    done = cli("build", "--target", "cuda", "--nvcc", "true", "--out", str(tmp_path), *arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "compiling" not in done.stderr


def test_a_picture_of_no_trials(tmp_path):
    """The records of the package contain only finals."""
    op, shape = "topk", "1x32768"
    found, _ = records.read_directory(records.default_directory())
    assert not [r for r in found if r.kind == "trial"]
    picture = tmp_path / "f.png"
    done = cli("records", "show", "--op", op, "--shape", shape, "--png", str(picture))
    assert done.returncode == 1 and "expected a search with trials" in done.stderr and not picture.exists(), done


#: Values that a user may give by mistake.
ODD = [
    "",
    "-1",
    "0",
    "1",
    "nan",
    "1e400",
    "9" * 20,
    "9" * 5000,
    "x",
    "1x",
    "x" * 300,
    "\udcff",
    "é€",
    "/",
    "/dev/null/x",
]


def test_no_traceback(tmp_path):
    """Tries odd values for every option of every command, in one process and with a fixed seed."""
    code = f"""
import io, random, sys, contextlib
from dsa_tvm import cli
from dsa_tvm.runtime import library
lot = random.Random(5)
odd = {ODD!r}
commands = {{
    "demo": ["", "--tokens", "--threads"],
    "bench": ["", "--suite=cuda", "--s-q", "--s-kv", "--threads", "--preset", "--dtype", "--seconds", "--json"],
    "build": ["--target", "--arch", "--nvcc", "--cc", "--records", "--preset", "--d-idx", "--d-qk", "--d-v", "--out"],
    "tune": ["", "--target", "--preset", "--shapes", "--trials", "--timeout", "--threads", "--output", "--rpc",
             "--key", "--cc", "--nvcc", "--build-only", "--measure", "--seed"],
    "cost": ["", "--preset", "--layer", "--heads", "--dtype", "--threads", "--price", "--phases", "--methods",
             "--chunk", "--seconds", "--limit", "--json", "--out"],
    "recall none": ["--text", "--tokenizer", "--topk", "--layers", "--tokens", "--queries", "--threads", "--out"],
    "records verify": [""],
    "records best": ["", "--target", "--op"],
    "records merge": ["", "--into"],
    "records show": ["", "--op", "--shape", "--png"],
    "env": ["--json"],
    "config": ["--libs", "--cflags"],
}}
for name, options in commands.items():
    for number in range(60):
        line = name.split()
        for option in lot.sample(options, lot.randrange(1, min(len(options), 4) + 1)):
            line += [option] * bool(option) + [lot.choice(odd)]
        # What is valid would work for minutes.
        if name == "bench" and "--s-kv" not in line: line += ["--s-kv", "0"]
        if name == "tune": line += ["--preset", "none"]
        if name == "build": line += ["--preset", "none", "--out", "/dev/null/x"]
        if name == "demo": line += ["--tokens", "7"]
        if name == "cost": line += ["--positions", "0"]
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = cli.main(line)
        except SystemExit as exit:
            status = exit.code
        except BaseException as error:
            print("TRACEBACK", line, type(error).__name__, error, file=sys.__stdout__)
            continue
        if status and not err.getvalue():
            print("SILENT", line, status)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, errors="replace", timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr
