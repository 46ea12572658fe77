"""The soak injects what it says, the same again for the same seed, and tells how to see a divergence again."""

import sys
from pathlib import Path

from simulated import Simulated

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import soak
import stack


@stack.long
def test_the_same_seed_injects_the_same_faults(tmp_path: Path) -> None:
    hospital = Simulated(tmp_path)
    one, other = (soak.soak(hospital, faults=5, seed=7) for _ in range(2))
    hospital.close()

    assert one.divergences == []
    assert one.injected >= 5
    assert one == other
    printed = soak.report(one, seconds=1.5, seed=7)
    assert "divergences" in printed
    assert "--history" not in printed


def test_all_kinds_of_histories_take_their_turn() -> None:
    ways = {soak.History.of(1, number).way for number in range(8)}
    assert ways == {"storm", "long day", "one by one"}
    assert soak.History.of(1, 3).steps == soak.History.of(1, 3).steps
    assert soak.History.of(1, 3).steps != soak.History.of(2, 3).steps


def test_a_divergence_is_told_with_the_command_that_shows_it_again() -> None:
    tally = soak.Tally(histories=9, divergences=[(8, ["study 0 is not shown"])])
    printed = soak.report(tally, seconds=1.5, seed=3)
    assert "python bench/soak.py --seed 3 --history 8\n  study 0 is not shown" in printed
