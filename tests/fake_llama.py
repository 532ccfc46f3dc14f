"""Stand-ins for llama.cpp's programs, which write what those write: files to run, for tests without llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

NANOSECONDS_PER_TOKEN = 1_000_000

# As llama-bench of build 9124 writes it, shortened to the fields that say what was run, and those of older builds too.
_BENCH = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
num_prompt, num_tokens = map(int, given["-pg"].split(","))
with open(given["-m"], "rb") as file:
    assert file.read(4) == b"GGUF"
nanoseconds = (num_prompt + num_tokens) * {nanoseconds}
print(json.dumps([{{
    "build_commit": "abcdef0", "build_number": 9124, "cpu_info": "a processor", "backends": "CPU",
    "model_filename": given["-m"], "model_type": "llama ?B all F32", "model_size": 1, "model_n_params": 1,
    "n_threads": int(given["-t"]), "n_gpu_layers": int(given["-ngl"]), "n_prompt": num_prompt, "n_gen": num_tokens,
    "n_depth": 0, "test_time": "2026-01-01T00:00:00Z", "avg_ns": nanoseconds, "stddev_ns": 0, "avg_ts": 1.0,
    "stddev_ts": 0.0, "samples_ns": [nanoseconds] * int(given["-r"]), "samples_ts": [1.0],
}}]))
"""

# As llama-speculative-simple writes it, to standard error. A round takes as long as a token by itself, and commits two.
_SPECULATIVE = """#!{python}
import sys
if "--help" in sys.argv:
    print("{help_text}")
    sys.exit()
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(given["-f"]).read()
assert all(open(given[name], "rb").read(4) == b"GGUF" for name in ("-m", "-md"))
assert int(given["{length_option}"]) > 0 and int(given["-c"]) > int(given["-n"])
num_tokens = int(given["-n"]) + 1
print("\\nencoded    5 tokens in    0.010 seconds, speed:  500.000 t/s", file=sys.stderr)
seconds = num_tokens * {nanoseconds} / 2e9
print(f"decoded {{num_tokens:4d}} tokens in {{seconds:8.3f}} seconds, speed: 0.000 t/s\\n", file=sys.stderr)
print("n_draft   = 4\\nn_predict = 9\\nn_drafted = 8\\nn_accept  = 4\\naccept    = 50.000%", file=sys.stderr)
"""


def write_program(path: Path, text: str) -> Path:
    """Write a file that can be run."""
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def write_bench(folder: Path) -> Path:
    """Write a llama-bench whose tokens take `NANOSECONDS_PER_TOKEN` each, those of the prompt too."""
    text = _BENCH.format(python=sys.executable, nanoseconds=NANOSECONDS_PER_TOKEN)
    return write_program(folder / "llama-bench", text)


def write_speculative(folder: Path, *, is_old: bool = False) -> Path:
    """Write a llama-speculative-simple that is twice as fast, and takes 10 ms for a prompt; or one with old options."""
    new, old = "--spec-draft-n-max N  --spec-type none,draft-simple", "--draft-max N"
    length_option = "--draft-max" if is_old else "--spec-draft-n-max"
    text = _SPECULATIVE.format(
        python=sys.executable,
        nanoseconds=NANOSECONDS_PER_TOKEN,
        help_text=old if is_old else new,
        length_option=length_option,
    )
    return write_program(folder / ("llama-speculative" if is_old else "llama-speculative-simple"), text)
