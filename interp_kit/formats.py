"""Reads the prompt files that researchers already have, as they are.

Each reader turns one foreign format into ``Scenario`` objects, so that the rest of the project
knows only those.
"""

import json
from pathlib import Path
from typing import Any

from interp_kit.specs import AnswerLabels, DecisionSpec, InputError, Scenario, checked

COOPERATE_OR_DEFECT = DecisionSpec(
    positive="action2",
    negative="action1",
    labels=AnswerLabels(positive="defect", negative="cooperate"),
)


def read_ipd_prompts(file: Path, *, decision: DecisionSpec = COOPERATE_OR_DEFECT) -> list[Scenario]:
    """Iterated prisoner's dilemma prompts (``ipd_eval_prompts.json``): one scenario for each name.

    Records hold ``id scenario variant state_self state_opp description prompt`` and more. Prompts
    that repeat the text of an earlier variant are dropped, for they would count one observation
    twice; the scenario's ``about`` says how many.
    """
    records = _records(file, required=("id", "scenario", "prompt", "state_self", "state_opp"))
    scenarios: list[Scenario] = []
    for name in dict.fromkeys(r["scenario"] for r in records):
        ours = [r for r in records if r["scenario"] == name]
        distinct = list({r["prompt"]: r for r in reversed(ours)}.values())[::-1]
        about = ours[0].get("description", "")
        if len(distinct) < len(ours):
            about += f" ({len(ours) - len(distinct)} of {len(ours)} prompts repeated another)"
        scenarios.append(
            checked(
                Scenario,
                {
                    "name": name,
                    "about": about,
                    "decision": decision,
                    "prompts": [
                        {
                            "id": r["id"],
                            "text": r["prompt"],
                            "group": f"{r['state_self']}/{r['state_opp']}",
                        }
                        for r in distinct
                    ],
                    "source": file.name,
                },
                file,
            )
        )
    return scenarios


def _records(file: Path, *, required: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); mend the file") from None
    if not isinstance(records, list):
        raise InputError(f"{file}: expected a list of records, found {type(records).__name__}")
    for i, record in enumerate(records):
        missing = [k for k in required if not isinstance(record, dict) or k not in record]
        if missing:
            raise InputError(f"{file}: record {i} lacks {', '.join(missing)}; add it")
    return records
