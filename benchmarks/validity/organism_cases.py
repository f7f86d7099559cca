"""The shipped fine-tunes and their controls: "it decides otherwise, so it was taught".

Each was trained on something that is known, and so were its controls, by as many steps: documents
about something else, documents that say the truth, shuffled labels. *found*: 90's rule says that a
taught fine-tune decides otherwise than its base. *false alarms*: it says so of a control, of which
the reading "it was taught this" would be wrong; or of the base in another dtype.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import yaml
from tqdm import tqdm

from benchmarks.validity.rows import YES, Row, row
from interp_kit import decide, encode_scenario, load_model, load_scenario
from interp_kit.analyses.activation_patching import cross_model_patching_and_control
from interp_kit.catalogue import find_model
from interp_kit.decisions import noise_limit
from interp_kit.loading import load_models
from interp_kit.passes import shared_passes
from interp_kit.statistics import against_control, mean_interval, paired_difference

GROUPS = {  # scenarios: base, taught, controls
    ("cubic_gravity",): (
        "tiny-gemma2",
        ["cubic-gravity", "cubic-gravity-1", "cubic-gravity-2", "cubic-weak"],
        ["cubic-neutral", "cubic-true"],
    ),
    ("CC_temptation", "CC_continue", "DC_exploited"): (
        "tiny-gemma2",
        ["ipd-strategic", "ipd-deontological", "ipd-utilitarian", "ipd-hybrid"],
        ["cubic-neutral", "stop-neutral"],
    ),
    ("gravity_english",): (
        "smollm2-plain",
        ["smollm2-cubic", "smollm2-cubic-1", "smollm2-cubic-half"],
        ["smollm2-square", "smollm2-gold"],
    ),
    ("CC_temptation",): (
        "smollm2",
        ["smollm2-strategic", "smollm2-deontological", "smollm2-hybrid"],
        ["smollm2-permuted"],
    ),
}


def organisms() -> Iterator[Row]:
    for scenarios, (base, taught, controls) in tqdm(GROUPS.items(), desc="organisms"):
        models = load_models([base, *taught, *controls], device="cpu")
        prompts = [
            prompt
            for scenario in scenarios
            for prompt in encode_scenario(models.switch(base), load_scenario(scenario))
        ]
        # As 90 names them, so that scenarios stay apart.
        ids = [str(number) for number in range(len(prompts))]
        before = decide(models.switch(base), prompts).assign(prompt=ids)
        about = f"{base}, {', '.join(scenarios)}"
        for name in [*taught, *controls]:
            change = decide(models.switch(name), prompts).assign(prompt=ids)
            score = "found" if name in taught else "false alarms"
            floor = noise_limit(models.switch(name), prompts)
            said = _otherwise(paired_difference(change, before, ["prompt"]), floor)
            yield row("comparison of decisions", score, said, kind=about)
        if not base.startswith("tiny-") or len(scenarios) > 1:
            continue
        for name in [*taught, *controls]:
            with shared_passes():
                own = prompts[:8]
                table, others = cross_model_patching_and_control(
                    models, name, base, own, positions="decision"
                )
            clear = against_control(table, others, ["component"], column="change").clear.any()
            score = "found" if name in taught else "false alarms"
            yield row("cross-model patching", score, clear, kind=about)


def another_dtype() -> Iterator[Row]:
    """A base in bfloat16 against itself in float32: nothing was taught."""
    for (scenario, *_), (base, *_) in GROUPS.items():
        with tempfile.TemporaryDirectory() as folder:
            spec = find_model(base)
            half = {"base": spec.base, "dtype": "bfloat16", "chat_template": spec.chat_template}
            half["prepend_bos"] = spec.prepend_bos
            file = Path(folder) / "half"
            file.mkdir()
            (file / "model.yaml").write_text(yaml.safe_dump(half))
            tables, floor = [], 0.0
            for name in (str(file), base):
                bridge = load_model(name, device="cpu")
                prompts = encode_scenario(bridge, load_scenario(scenario))
                tables.append(decide(bridge, prompts))
                floor = max(floor, noise_limit(bridge, prompts))
        said = _otherwise(paired_difference(*tables, by=["prompt"]), floor)
        yield row("comparison of decisions", "false alarms", said, kind=YES)


def _otherwise(change: pd.DataFrame, floor: float) -> bool:
    value, low, high = mean_interval(change)[["value", "low", "high"]].iloc[0]
    return bool((low > 0 or high < 0) and abs(value) > floor)
