"""The batch program's job on Ray Data: several engines, one a GPU (on CPU, one an actor).

    pip install 'minidsv[ray]'
    python scripts/ray_batch.py --input in.jsonl --output out.jsonl --actors 2

An example of how to go beyond one machine: lines are understood, answered and written as by
scripts/batch_generate.py, but in blocks that Ray deals out, which know no line numbers and nothing
of one another: without a custom_id a line's name, and so its seed, comes from its CRC-32, a
custom_id that comes twice is answered twice, and a line of blanks is an error. Ray restarts actors
that die. Results come in the order that Ray finishes blocks; there is no resuming. Every node needs
minidsv.

Run once, on 2026-11-23: Ray 2.60.0, pyarrow 26.0.1, Python 3.11.7, torch 2.13.0 on 2 CPU cores, two
actors with the bundled model, 600 greedy lines and a broken one gave 600 results with the texts of
scripts/batch_generate.py, and one error. It has not been run on a GPU or on a second machine.
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import ray

from batch_journal import Journal
from batch_lines import Answer, Failure, LineError, dump, parse
from batch_local import LocalBackend
from minidsv import LLM
from minidsv.cli import limit_threads
from minidsv.engine_config import model_path

SCRIPTS = Path(__file__).resolve().parent
BLOCK = 256  # lines that an actor answers at once


class Worker:
    """A Ray actor with an engine."""

    def __init__(self, options: dict[str, Any]):
        llm = LLM(**options)
        limit_threads(llm.engine)
        self._seed = llm.engine.config.seed
        self._backend = LocalBackend(llm, model_path(llm.engine.config).resolve().name)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`text`, lines [n] -> `record`, JSON [n], and whether it is an answer, `ok` [n]."""
        results: list[Answer | Failure] = []
        running = 0
        for text in block["text"]:
            line = text.encode()
            number = zlib.crc32(line)  # blocks know no line numbers, yet ids need one
            job = None
            try:
                job = parse(line, number, self._backend.urls, self._seed)
                self._backend.submit(job)
                running += 1
            except LineError as error:
                results.append(Failure(number, job, error))
        while running:
            finished = self._backend.poll()
            running -= len(finished)
            results += finished
        ok = [isinstance(result, Answer) for result in results]
        records = [r.line() if isinstance(r, Answer) else r.record() for r in results]
        return {"record": np.array([dump(r).decode() for r in records]), "ok": np.array(ok)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="JSONL file")
    parser.add_argument("--output", required=True, help="file that is written anew")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--options", type=json.loads, default={}, help="LLM's arguments, in JSON")
    args = parser.parse_args()
    ray.init(runtime_env={"working_dir": str(SCRIPTS)})
    no_cpu = {"num_cpus": 0}  # or the reader waits for the processors that the engines hold
    lines = ray.data.read_text(str(Path(args.input).resolve()), ray_remote_args=no_cpu)
    answers = lines.map_batches(
        Worker,
        fn_constructor_args=(args.options,),
        batch_size=BLOCK,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=1,
        num_gpus=args.gpus,
    )
    counts = {True: 0, False: 0}
    paths = {True: args.output, False: f"{args.output}.errors.jsonl"}
    with Journal(paths[True], 64, 1.0) as results, Journal(paths[False], 64, 1.0) as errors:
        journals = {True: results, False: errors}
        for journal in journals.values():
            journal.clear()
        for row in answers.iter_rows():
            ok = bool(row["ok"])
            journals[ok].write(row["record"].encode())
            counts[ok] += 1
    print(json.dumps({"ok": counts[True], "failed": counts[False]}))


if __name__ == "__main__":
    main()
