"""Claims are decided by what is saved: every kind of question has a case that flips its answer."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter, ValidationError

from diablo_theory.errors import ConfigError, ResultsError
from diablo_theory.reporting.claims import Claim, decide, read_claims, readable_claims
from diablo_theory.reporting.evidence import Evidence, NotMadeError
from diablo_theory.reporting.questions import Answer, AnyQuestion, Outcome

ROOT = Path(__file__).parents[2]
PAPERS = ROOT / "paper_results"


def question(**keys):
    return TypeAdapter(AnyQuestion).validate_python(keys)


def evidence(**frames):
    """Evidence with some parts made up; all others as in a folder where nothing was ever made."""
    found = Evidence(PAPERS / "nowhere", PAPERS / "nowhere")
    found.__dict__.update(frames)
    return found


def ask(keys, **frames):
    return question(**keys).ask(evidence(**frames))


@pytest.fixture(scope="module")
def saved():
    return Evidence(PAPERS / "reproduced", PAPERS)


@pytest.fixture(scope="module")
def claims():
    return read_claims(PAPERS / "claims.yaml")


def test_every_claim_of_the_paper_is_decided_by_what_is_saved(claims, saved):
    decided = {found.claim.id: found for found in (decide(claim, saved) for claim in claims)}
    assert len(decided) == len(claims) >= 30
    assert decided["gradients"].outcome == Outcome.HOLDS
    assert decided["stationary-points"].outcome == Outcome.CONDITIONAL
    assert decided["faster-than-dora"].outcome == Outcome.FAILS
    assert decided["faster-than-dora"].answers[0].evidence.endswith("(asked: at least 2.8)")
    assert decided["premise-in-practice"].answers[0].scale.startswith("SmolLM2-135M-Instruct, 20 layers, ")
    assert decided["commonsense-llama2-7b"].outcome == Outcome.OPEN
    assert "DiaBlo: 1 x A100-80GB, 4.6 to 7.7 h" in decided["commonsense-llama2-7b"].answers[0].decides
    assert {found.claim.by for found in decided.values()} == {"paper", "ours"}
    words = readable_claims(list(decided.values()))
    assert words["Evidence"].str.len().gt(20).all()
    assert set(words["Outcome"]) <= {outcome.words for outcome in Outcome}


def test_no_outcome_is_written_in_the_file():
    text = (PAPERS / "claims.yaml").read_text()
    assert not any(outcome.words in line for outcome in Outcome for line in text.splitlines() if ":" in line)


VERDICTS = pd.DataFrame(
    {
        "check": ["L2", "L2", "L4", "L2"],
        "role": ["claim", "control", "claim", "claim"],
        "statement": ["diablo is", "diablo is", "lora is", "lora is"],
        "instance": "b=20 m1=16 m2=30 N=2",
        "passed": True,
    }
)


def test_one_failed_trial_or_one_control_that_holds_is_enough():
    keys = {"kind": "verdicts", "checks": ["L2"]}
    assert ask(keys, verdicts=VERDICTS).outcome == Outcome.HOLDS
    for place in (0, 1, 3):
        broken = VERDICTS.copy()
        broken.loc[place, "passed"] = False
        assert ask(keys, verdicts=broken).outcome == Outcome.FAILS
    answer = ask(keys, verdicts=VERDICTS)
    assert answer.evidence == "L2: 2 of 2 trials hold and 1 of 1 controls fail, as they must"
    assert answer.scale == "random problems, no side longer than 30"
    with pytest.raises(NotMadeError, match=r"no claim of the check\(s\) S3 is saved; `diablo-theory reproduce` makes"):
        ask({"kind": "verdicts", "checks": ["S3"]}, verdicts=VERDICTS)
    with pytest.raises(NotMadeError, match=r"no control of the check\(s\) L4 is saved"):
        ask({"kind": "verdicts", "checks": ["L4"]}, verdicts=VERDICTS)


def test_words_that_no_statement_has_are_refused():
    keys = {"kind": "verdicts", "checks": ["L2"]}
    with pytest.raises(ResultsError, match="no statement of L2 has the words 'dialbo is'"):
        ask(keys | {"statements": ["diablo is", "dialbo is"]}, verdicts=VERDICTS)
    claim = Claim(id="a", by="paper", claim="c", where="w", asks=({**keys, "statements": ["diablo", "dialbo"]},))
    with pytest.raises(ResultsError, match="claim a: no statement of L2"):
        decide(claim, evidence(verdicts=VERDICTS))
    with pytest.raises(ValidationError):
        question(kind="gradient_norms", over="diablo", after=5)


def test_only_the_statements_in_question_count():
    keys = {"kind": "verdicts", "checks": ["L2"], "statements": ["diablo"]}
    broken = VERDICTS.copy()
    broken.loc[3, "passed"] = False  # LoRA's
    assert ask(keys, verdicts=broken).outcome == Outcome.HOLDS
    broken.loc[0, "passed"] = False
    assert ask(keys, verdicts=broken).outcome == Outcome.FAILS
    with pytest.raises(NotMadeError, match="no claim"):
        ask(keys | {"statements": ["nobody"]}, verdicts=VERDICTS)


LOSS = "loss_per_token"


def differences(*rows):
    """Rows of others minus DiaBlo: (method, task, metric, low, high)."""
    frame = pd.DataFrame(rows, columns=["method", "task", "metric", "low", "high"])
    return frame.assign(
        value=(frame["low"] + frame["high"]) / 2,
        suite=frame["task"],
        label=frame["method"].str.upper(),
        scale="small",
        base="float32",
        model="tiny",
        diablo=np.where(frame["metric"] == LOSS, 0.4, 50.0),
        seeds=3,
        diverged=0,
        diablo_diverged=0,
        experiment=range(len(frame)),
        reference=99,
    )


COMPARED = {"kind": "compared", "methods": ["lora"], "tasks": ["boolq"], "margin": 0.05}


@pytest.mark.parametrize(
    ("low", "high", "outcome", "words"),
    [
        (0.1, 0.3, Outcome.HOLDS, "ahead of LORA on BoolQ by 0.200 (0.100 to 0.300) nats/token"),
        (-0.01, 0.015, Outcome.HOLDS, "within 5% of LORA on BoolQ"),
        (-0.015, -0.005, Outcome.HOLDS, "within 5% of LORA on BoolQ"),  # more seeds do not turn a match into a defeat
        (-0.3, 0.1, Outcome.OPEN, "not told from LORA on BoolQ: intervals reach to 0.3 nats/token"),
        (-0.3, -0.1, Outcome.FAILS, "behind LORA on BoolQ by 0.200 (0.100 to 0.300) nats/token"),
    ],
)
def test_differences_decide_by_their_intervals(low, high, outcome, words):
    answer = ask(COMPARED, differences=differences(("lora", "boolq", LOSS, low, high)))
    assert answer.outcome == outcome
    assert words in answer.evidence


def test_of_shares_more_is_better():
    answer = ask(
        COMPARED | {"metric": "exact_match"}, differences=differences(("lora", "boolq", "exact_match", -5.0, -3.0))
    )
    assert answer.outcome == Outcome.HOLDS
    assert "ahead of LORA on BoolQ by 4.000 (3.000 to 5.000) points" in answer.evidence


def test_one_task_behind_decides_and_a_method_that_was_not_run_leaves_it_open():
    rows = differences(("lora", "boolq", LOSS, 0.1, 0.2), ("lora", "arc_easy", LOSS, -0.2, -0.1))
    both = COMPARED | {"tasks": ["boolq", "arc_easy"]}
    assert ask(both, differences=rows).outcome == Outcome.FAILS
    assert ask(COMPARED, differences=rows).outcome == Outcome.HOLDS  # the other task is not asked for
    for keys, words in (
        (both | {"methods": ["lora", "dora"]}, "of DoRA on ARC-Easy, DoRA on BoolQ fewer than 3 seeds are collected"),
        (both | {"tasks": ["boolq", "word_problems"]}, "of LoRA on Word problems fewer than 3 seeds"),
        (both | {"suites": ["patterns"], "methods": []}, "of any method on BoolQ, any method on ARC-Easy fewer than"),
        (COMPARED | {"seeds": 4}, "of LoRA on BoolQ fewer than 4 seeds"),
        (COMPARED | {"scale": "full"}, "of LoRA on BoolQ fewer than 3 seeds"),
    ):
        missing = ask(keys, differences=rows)
        assert missing.outcome == Outcome.OPEN
        assert words in missing.evidence
        assert "diablo-theory sweep" in missing.decides


def test_bases_and_lost_seeds_are_told():
    rows = differences(("lora", "boolq", LOSS, 0.1, 0.2), ("lora", "boolq", LOSS, 0.2, 0.3))
    rows = rows.assign(base=["4 bits, rtn", "4 bits, magr-optq"], diverged=[0, 1])
    text = ask(COMPARED, differences=rows).evidence
    assert "ahead of LORA (4 bits, rtn) on BoolQ" in text
    assert "of LORA (4 bits, magr-optq) on BoolQ some seeds diverged" in text


def steps(ratio, memory=1.0):
    rounds = range(20)
    seconds = {"DiaBlo": 1.0, "DoRA": ratio}
    times = pd.DataFrame(
        [
            {
                "workload": "w",
                "num_blocks": 64,
                "round": n,
                "method": name,
                "phase": "step",
                "seconds": s * (1 + n / 1e3),
            }
            for n in rounds
            for name, s in seconds.items()
        ]
    )
    contenders = pd.DataFrame(
        {
            "workload": "w",
            "num_blocks": 64,
            "name": ["diablo", "dora"],
            "method": ["DiaBlo", "DoRA"],
            "static_mib": [100.0, 100.0 * memory],
            "step_peak_mib": 0.0,
            "cpu": "c",
            "threads": 2,
        }
    )
    return times, contenders


def test_times_and_memory_are_held_against_their_limits():
    slower = {"kind": "step_ratio", "of": "dora", "over": "diablo", "at_least": 2.8}
    assert ask(slower, steps=steps(3.0)).outcome == Outcome.HOLDS
    assert ask(slower, steps=steps(1.2)).outcome == Outcome.FAILS
    below = {"kind": "step_ratio", "of": "dora", "over": "diablo", "at_most": 1.0}
    assert ask(below, steps=steps(0.9)).outcome == Outcome.HOLDS
    assert ask(below, steps=steps(1.1)).outcome == Outcome.FAILS
    noisy = steps(1.0)
    noisy[0].loc[noisy[0]["method"] == "DoRA", "seconds"] *= np.tile([0.8, 1.2], 10)
    assert ask(below, steps=noisy).outcome == Outcome.OPEN
    memory = {"kind": "memory", "of": "dora", "over": "diablo", "at_most": 1.005}
    assert ask(memory, steps=steps(1.0)).outcome == Outcome.HOLDS
    assert ask(memory, steps=steps(1.0, 1.7)).outcome == Outcome.FAILS
    with pytest.raises(ValidationError, match="needs at_most or at_least"):
        question(kind="step_ratio", of="dora", over="diablo")
    with pytest.raises(NotMadeError, match="the step benchmark was run without shira; `diablo-theory bench --out"):
        ask(memory | {"of": "shira"}, steps=steps(1.0))


def layers(held, frozen=0.5):
    return pd.DataFrame(
        {
            "layer": ["a", "b"],
            "premise_holds": held,
            "block_rows": 9,
            "energy_rank": [9, 90],
            "num_blocks": 64,
            "tokens": 1000,
            "capture_diablo": 0.4,
            "capture_lora_frozen": frozen,
        }
    )


def test_a_premise_holds_everywhere_or_not():
    outcomes = [
        ask({"kind": "premise"}, layers=layers(held)).outcome for held in ([True] * 2, [True, False], [False] * 2)
    ]
    assert outcomes == [Outcome.HOLDS, Outcome.FAILS, Outcome.FAILS]
    assert "1 to 10 times" in ask({"kind": "premise"}, layers=layers([False] * 2)).evidence


def test_captures_are_compared_layer_by_layer():
    keys = {"kind": "captures", "of": "lora_frozen", "over": "diablo"}
    assert ask(keys, layers=layers([False] * 2)).outcome == Outcome.HOLDS
    assert ask(keys, layers=layers([False] * 2, [0.5, 0.3])).outcome == Outcome.FAILS
    with pytest.raises(ValidationError, match="lora_frozen"):
        question(**keys | {"of": "energy_rank"})


def training(spread):
    """Norms around one, DiaBlo's with a spread of 0.1, LoRA's with others, a seed each."""
    steady = np.tile([0.9, 1.1], 10)
    rows = []
    for seed, width in enumerate(spread):
        for method, norms in (("diablo", steady), ("lora", 1 + (steady - 1) * width)):
            # The first steps, which do not count, would turn every answer round.
            norms = np.concatenate([[100.0] if method == "diablo" else [1.0], norms])
            rows.append(pd.DataFrame({"method": method, "seed": seed, "step": range(5, 26), "grad_norm": norms}))
    found = pd.concat(rows).assign(suite="boolq", train_on="boolq", alike=0, scale="small", state="finished")
    return found.assign(run_id=found["method"] + found["seed"].astype(str), model="tiny")


NORMS = {"kind": "gradient_norms", "over": "lora", "after": 5, "pairs": 3}


@pytest.mark.parametrize(
    ("spreads", "outcome"),
    [
        ((2, 3, 2.5), Outcome.HOLDS),
        ((0.5, 0.3, 0.4), Outcome.FAILS),
        ((3, 0.5, 2), Outcome.OPEN),
        ((3, 2.5, 3, 2.5, 3, 2.5, 3, 0.9), Outcome.HOLDS),  # one pair the other way round does not keep it open
        ((2, 3), Outcome.OPEN),  # too few
    ],
)
def test_norms_are_compared_seed_by_seed_after_the_warm_up(spreads, outcome):
    assert ask(NORMS, training=training(spreads)).outcome == outcome


def test_norms_are_told_with_their_ratio():
    found = ask(NORMS, training=training((2, 2, 2.2)))
    assert "BoolQ 0.10 against 0.21" in found.evidence
    assert "the ratio is 0.48 (0.42 to 0.56), below 1 in 3 of 3 pairs of runs" in found.evidence
    assert found.evidence.endswith("no run of DiaBlo's diverged")
    assert found.scale == "tiny, small scale"
    few = ask(NORMS, training=training((2, 3)))
    assert few.evidence == "2 pairs of runs of DiaBlo and LoRA; 3 are needed; no run of DiaBlo's diverged"


def test_norms_are_those_of_finished_runs_that_differ_in_the_method_alone():
    rows = training((2, 3, 2.5))
    died = rows[(rows["method"] == "diablo") & (rows["seed"] == 1)].assign(state="diverged", run_id="diablo9", seed=9)
    found = ask(NORMS, training=pd.concat([rows, died]))
    assert found.outcome == Outcome.FAILS
    assert found.evidence.endswith("below 1 in 3 of 3 pairs of runs; diverged: diablo9")
    early = died.assign(step=np.nan, grad_norm=np.nan)  # before it logged a step
    assert ask(NORMS, training=pd.concat([rows, early])).outcome == Outcome.FAILS
    assert ask(NORMS | {"pairs": 9}, training=pd.concat([rows, early])).outcome == Outcome.FAILS
    other_rate = rows[(rows["method"] == "diablo") & (rows["seed"] == 1)].assign(grad_norm=1.0, run_id="other")
    assert "2 of 2 pairs" in ask(NORMS | {"pairs": 2}, training=pd.concat([rows, other_rate])).evidence
    for nothing in (rows.assign(scale="full"), rows[rows["method"] == "lora"], rows.iloc[:0]):
        assert ask(NORMS, training=nothing).outcome == Outcome.OPEN


HEADLINE = {
    "kind": "headline",
    "suite": "commonsense",
    "model": "LLaMA-13B",
    "against": ["dora"],
    "runs": {"diablo": "commonsense/llama-13b_diablo.yaml"},
}


def test_headlines_stay_open_and_name_other_sources(saved):
    answer = question(**HEADLINE, also="patience").ask(saved)
    assert answer.outcome == Outcome.OPEN
    assert answer.evidence == "DiaBlo 84.9, DoRA 80.8 (elsewhere 81.5)"
    assert answer.decides.endswith("; patience); of DoRA there is no run file")
    with pytest.raises(
        ResultsError, match="no published number of c3a for commonsense, LLaMA-13B, average, exact_match"
    ):
        question(**HEADLINE | {"against": ["c3a"]}).ask(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "LLaMA-31B"}, r"unknown model of the published suite commonsense 'LLaMA-31B'\. .* 'LLaMA-13B'\?"),
        (
            {"runs": {"diablo": "commonsense/llama-13b_dibalo.yaml"}},
            r"no run file 'commonsense/llama-13b_dibalo.yaml' .* 'commonsense/llama-13b_diablo.yaml'\?",
        ),
        (
            {"runs": {"diablo": "sweeps/small_scale.yaml"}},
            r"small_scale.yaml is no file of a run, which has no key 'parts'",
        ),
    ],
)
def test_a_model_or_file_that_is_none_of_a_headline_is_told(saved, changes, message):
    with pytest.raises(ResultsError, match=message):
        question(**HEADLINE | changes).ask(saved)


def test_elsewhere_is_the_same_setting_in_another_source(saved):
    two = HEADLINE | {"model": "LLaMA2-7B", "against": ["dora"], "level": ["full"]}
    answer = question(**two).ask(saved)
    assert "79.7" not in answer.evidence  # DoRA's own number at the other rank
    assert "as printed not ahead of full fine-tuning" in answer.evidence
    bits = {"suite": "quantised", "model": "LLaMA2-7B", "against": ["loftq"], "containing": "4 bits"}
    drawn = question(**HEADLINE | bits | {"runs": {"diablo": "quantised/4bit_magr-diablo.yaml"}})
    assert "LoftQ 52.3 (read off a chart)" in drawn.ask(saved).evidence


def test_an_open_answer_says_what_would_close_it(saved, claims):
    with pytest.raises(ValueError, match="what would decide it"):
        Answer(Outcome.OPEN, "nobody knows", "small", "nowhere")
    for claim in claims:
        for answer in decide(claim, saved).answers:
            assert answer.outcome != Outcome.OPEN or "diablo-theory" in answer.decides


def test_quotes_are_right_or_not(saved):
    keys = {"kind": "quotes", "methods": ["diablo"]}
    right = saved.counts.assign(quoted_pct=saved.counts["pct"].round(2))
    assert question(**keys).ask(saved).outcome == Outcome.FAILS
    assert ask(keys, counts=right).outcome == Outcome.HOLDS
    with pytest.raises(ResultsError, match=r"no count of c3a is quoted; of .*diablo.* there are some"):
        ask(keys | {"methods": ["c3a"]}, counts=right)


def test_the_worst_answer_is_the_outcome_and_conditions_are_told():
    claim = Claim(
        id="a",
        by="paper",
        claim="It is so.",
        where="there",
        conditions="if",
        asks=({"kind": "verdicts", "checks": ["L2"]},),
    )
    assert decide(claim, evidence(verdicts=VERDICTS)).outcome == Outcome.CONDITIONAL
    both = Claim(**claim.model_dump() | {"asks": [*claim.model_dump()["asks"], {"kind": "premise"}]})
    found = decide(both, evidence(verdicts=VERDICTS))
    assert found.outcome == Outcome.OPEN
    assert "`diablo-theory diagnose" in found.answers[1].evidence
    assert decide(both, evidence(verdicts=VERDICTS, layers=layers([False] * 2))).outcome == Outcome.FAILS


ONE = """claims:
  - {id: a, by: paper, claim: c, where: w, asks: [{kind: premise}]}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE.replace("where: w", "wheer: w"), r"claim a: unknown key 'wheer'\. Did you mean 'where'\?"),
        (ONE.replace("by: paper", "by: me"), r"claim a: by='me' is not allowed"),
        (ONE.replace("id: a, ", ""), "claim 1: id is missing"),
        (ONE.replace("kind: premise", "kind: guess"), "guess"),
        (ONE.replace("kind: premise", "kind: premise, so: 1"), "claim a: unknown key 'asks.0.premise.so'"),
        (ONE + "  - 5", "claims.1=5 is not allowed"),
        (ONE + ONE.splitlines()[1], "the id 'a' occurs twice"),
        ("claims: []", "claims"),
    ],
)
def test_a_malformed_file_is_told(tmp_path, text, message):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises((ResultsError, ConfigError), match=message):
        read_claims(tmp_path / "claims.yaml")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("kind: compared, mehtods: [lora], tasks: [boolq], margin: 0.05", r"asks.0.compared.mehtods'\. .*methods'\?"),
        ("kind: compared, methods: [lorra], tasks: [boolq], margin: 0.05", r"unknown method 'lorra'\. .* 'lora'\?"),
        ("kind: compared, methods: [none], tasks: [boolq], margin: 0.05", "none is the untouched model"),
        ("kind: compared, tasks: [bolq], margin: 0.05", r"unknown task 'bolq'\. Did you mean 'boolq'\?"),
        ("kind: compared, suites: [paterns], tasks: [boolq], margin: 0.05", r"unknown suite .* 'patterns'\?"),
        ("kind: compared, metric: exact, tasks: [boolq], margin: 0.05", r"unknown metric .* 'exact_match'\?"),
        ("kind: verdicts, checks: [L22]", r"unknown check 'L22'\. Did you mean 'L2'\?"),
        ("kind: gradient_norms, over: lroa, after: 5", r"unknown method 'lroa'\. Did you mean 'lora'\?"),
        ("kind: step_ratio, of: diablo, over: flor, at_most: 1", r"unknown contender .*'flor'\. .* 'floor'\?"),
        ("kind: step_ratio, of: dora, over: lora, at_least: 2, at_most: 1", "at_most 1 is below at_least 2"),
        ("kind: memory, of: lora, over: lora, at_most: 1", "of and over are both lora"),
        ("kind: captures, of: diablo, over: diablo", "of and over are both diablo"),
        ("kind: quotes, methods: [dibalo]", r"unknown published method 'dibalo'\. Did you mean 'diablo'\?"),
        ("kind: headline, suite: comonsense, model: m, against: [lora], runs: {diablo: a}", r"'commonsense'\?"),
        ("kind: headline, suite: code, model: m, against: [lorra], runs: {diablo: a}", r"'lora'\?"),
        ("kind: headline, suite: code, model: m, against: [diablo], runs: {diablo: a}", "names diablo itself"),
        (
            "kind: headline, suite: code, model: m, tables: [gsm8k], against: [lora], runs: {diablo: a}",
            "table of code",
        ),
        ("kind: headline, suite: code, model: m, metric: pas@1, against: [lora], runs: {diablo: a}", r"'pass@1'\?"),
    ],
)
def test_a_name_that_nothing_has_is_refused_by_the_claim_s_id(tmp_path, asked, message):
    (tmp_path / "claims.yaml").write_text(ONE.replace("kind: premise", asked))
    with pytest.raises(ResultsError, match=rf"claims.yaml, claim a: .*{message}"):
        read_claims(tmp_path / "claims.yaml")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_claims(tmp_path / "claims.yaml")
