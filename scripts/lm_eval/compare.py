"""Hold lm-eval's log-likelihoods to the in-process scorer.

    python scripts/lm_eval/compare.py OUT...    # folders that `lm_eval run --log_samples` wrote

Each run's (context, continuation) pairs are scored again through `LLM`. Exits with 1 unless every
choice that a run took, and every "was it greedy", is that of the scorer.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minidsv import LLM, SamplingParams

Score = tuple[float, bool]  # log-likelihood, whether every token was the best


def score(llm: LLM, context: str, continuation: str) -> Score:
    """As lm-eval splits them: tokens of the whole text behind those of the context."""
    encode = llm.engine.tokenizer.encode
    ids, first = encode(context + continuation), len(encode(context))
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, logprobs=1)
    known = llm.generate([ids], params)[0].prompt_logprobs or []
    pairs = zip(known[first:], ids[first:], strict=True)
    entries = [at[token] for at, token in pairs if at is not None]
    return sum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries)


def samples(folder: Path) -> list[dict[str, Any]]:
    """Every sample of a run."""
    return [
        json.loads(line)
        for file in sorted(folder.rglob("samples_*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


def compare(folder: Path, want: dict[tuple[str, str], Score], llm: LLM) -> bool:
    """Print how one run agrees; scores are kept in `want` for the next."""
    found, right, same_choice, same_greedy, same_bits, worst = 0, 0.0, 0, 0, 0, 0.0
    for sample in samples(folder):
        pairs = [(a["arg_0"], a["arg_1"]) for a in sample["arguments"].values()]
        ours = [want.setdefault(p, want[p] if p in want else score(llm, *p)) for p in pairs]
        theirs = [(float(r[0][0]), str(r[0][1]) == "True") for r in sample["resps"]]
        found += 1
        right += sample["acc"]
        same_choice += ours.index(max(ours)) == theirs.index(max(theirs))
        same_greedy += [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
        same_bits += ours == theirs
        worst = max(worst, *(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)))
    print(
        f"{folder.name}: {found} items, accuracy {right / found:.3f}; as the in-process scorer: "
        f"choice {same_choice}, greedy {same_greedy}, all bits {same_bits}; "
        f"largest difference {worst:.1e}"
    )
    return same_choice == same_greedy == found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT")
    llm, want = LLM(device="cpu"), dict[tuple[str, str], Score]()
    agree = [compare(folder, want, llm) for folder in parser.parse_args().folders]
    sys.exit(not all(agree))


if __name__ == "__main__":
    main()
