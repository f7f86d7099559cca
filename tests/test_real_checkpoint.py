"""A pretrained model from elsewhere, by folder and by scenario file, through the notebooks."""

import json

import pandas as pd
import yaml

from interp_batch.matrix import expand
from interp_batch.runner import read_status, run_cells
from interp_kit.catalogue import read_run

SCENARIO = {
    "about": "Who is the story about?",
    "decision": {
        "positive": " he",
        "negative": " she",
        "labels": {"positive": "he", "negative": "she"},
    },
    "prompts": [
        {
            "id": f"{boy}-{girl}",
            "text": f"Once upon a time, there was a boy named {boy}. One day,",
            "counterfactual": f"Once upon a time, there was a girl named {girl}. One day,",
        }
        for boy, girl in (("Tim", "Lily"), ("Ben", "Sue"), ("Tom", "Amy"))
    ],
}


def test_stories260k_runs_lens_and_attribution_without_a_change_to_the_package(shared, tmp_path):
    (tmp_path / "he_or_she.yaml").write_text(yaml.safe_dump(SCENARIO))
    run = {
        "models": [str(shared / "models" / "stories260K")],
        "scenarios": [str(tmp_path / "he_or_she.yaml")],
        "notebooks": {"01_logit_lens": {}, "02_direct_logit_attribution": {}},
    }
    (tmp_path / "stories.yaml").write_text(yaml.safe_dump(run))
    cells = expand(read_run(tmp_path / "stories.yaml"), outputs=tmp_path / "outputs")
    outcomes = run_cells(cells, workers=2)
    for outcome in outcomes:
        status = read_status(outcome.cell.folder)
        assert outcome.state == "ok", status.get("traceback")
    lens, attribution = (o.cell.folder for o in outcomes)
    values = json.loads((lens / "summary.json").read_text())["values"]
    assert values["final_decision"]["value"] > 0  # a boy's story goes on with "he"
    table = pd.read_parquet(attribution / "table.parquet")
    assert set(table.kind) == {"embed", "head", "mlp"}
