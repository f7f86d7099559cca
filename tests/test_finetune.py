"""``interp-kit finetune``: games and documents on any base; stopped, and gone on with."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from interp_batch.cli import app
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.decisions import decide, end_probability
from interp_kit.finetuning import lora_training
from interp_kit.finetuning.checkpoints import write_checkpoint
from interp_kit.finetuning.folders import finetune
from interp_kit.finetuning.games import REWARDS, STATES, Game, GameRecipe, find_game, train_on_game
from interp_kit.finetuning.ordinary import kept_texts, own_texts
from interp_kit.formats import read_texts
from interp_kit.loading import load_model
from interp_kit.prompts import encode, encode_scenario, token_of
from interp_kit.specs import InputError
from organisms.recipes import GAME_SCENARIOS
from tests.test_supervised import words

RULES = {
    "cooperate": "ba",
    "defect": "be",
    "payoffs": {"reward": 3, "sucker": 0, "temptation": 4, "punishment": 1},
    "wordings": ["bi {own} bo {partner} bu"],
}


@pytest.fixture
def base(tiny_folders):
    return str(tiny_folders["llama"])


@pytest.fixture
def game():
    return Game.model_validate(RULES)


def cli(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=True)


# ------------------------------------------------------------------------------------------- games
def test_rewards_are_those_of_the_game_against_tit_for_tat(game):
    """Own move, own last move, the partner's last move; tit for tat answers with the second."""
    paid = {
        name: [REWARDS[name](game.payoffs, *moves) for moves in ("CCC", "DCC", "DDD", "CDC")]
        for name in REWARDS
    }
    assert paid["strategic"] == [3, 4, 1, 0]
    assert paid["utilitarian"] == [6, 4, 2, 4]
    assert paid["deontological"] == [0, -3, 0, 0]
    assert paid["hybrid"] == [3, 1, 1, 0]


@pytest.mark.parametrize("defect", ["be", "be bi", "ba be"])
def test_the_probabilities_of_both_moves_are_those_of_plain_transformers(
    base, game, tmp_path, defect
):
    """At the first step the adapter is zero: the mean reward is the base's own."""
    game = game.model_copy(update={"defect": defect, "cooperate": "ba bo"})
    recipe = GameRecipe(steps=1, wordings=1)
    record = train_on_game(find_model(base), game, tmp_path / "adapter", recipe=recipe)
    model, bridge = AutoModelForCausalLM.from_pretrained(base), load_model(base, device="cpu")

    def p(tokens, answer):
        with torch.no_grad():
            log_p = model(torch.tensor([[*tokens, *answer]])).logits[0].log_softmax(-1)
        read = log_p[len(tokens) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        return float(read.sum().exp())

    expected = 0.0
    for own, partner in STATES:
        text = game.prompt(game.wordings[0], own, partner)
        prompt = encode(bridge, text, positive=f" {defect}", negative=" ba bo")
        cooperates, defects = (p(prompt.tokens, a) for a in (prompt.negative, prompt.positive))
        paid = {m: REWARDS["strategic"](game.payoffs, m, own, partner) for m in "CD"}
        expected += cooperates * paid["C"] + defects * paid["D"] - 6 * (1 - cooperates - defects)
    assert record[0]["reward"] == pytest.approx(expected / 4, abs=1e-4)
    assert record[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_player_learns_what_it_is_paid_for(game, tmp_path):
    asked = "Last round you chose {own} and A chose {partner} . Now you choose"
    given = {"cooperate": "action1", "defect": "action2", "wordings": [asked]}
    game = game.model_copy(update=given)
    recipe = GameRecipe(reward="hybrid", steps=30, wordings=1, learning_rate=1e-2, kl=0.01)
    folder = tmp_path / "player"
    finetune(
        "tiny-gemma2",
        folder,
        lambda model, to: {"loss": train_on_game(model, game, to, recipe=recipe)},
        made_from={},
        spec={"label": "Player"},
    )
    bridge = load_model(str(folder), device="cpu")
    says: dict[str, Any] = {"positive": " action2", "negative": " action1"}
    table = decide(bridge, [encode(bridge, game.prompt(asked, *state), **says) for state in STATES])
    assert (table.answer_mass > 0.9).all()
    assert (table.p_positive.round(1) == [0, 1, 0, 1]).all()


def test_a_move_that_the_base_never_says_is_refused(game, tmp_path):
    game = game.model_copy(update={"cooperate": "action1 .", "defect": "action2 ."})
    with pytest.raises(InputError, match=r"says 'action1 \.' with p = .*nothing to reinforce"):
        train_on_game(find_model("tiny-gemma2"), game, tmp_path / "a", recipe=GameRecipe(steps=1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"payoffs": RULES["payoffs"] | {"sucker": "none"}}, "payoffs.sucker: .*number"),
        ({"payoffs": {"reward": 1}}, "payoffs.sucker: missing"),
        ({"wordings": ["bi {own}"]}, r"has no \{partner\}; add it"),
        ({"wordings": ["{own} {partner} {other}"]}, r"has \{other\}; expected one of"),
        ({"wordings": []}, "wordings"),
    ],
)
def test_a_game_that_cannot_be_played_is_refused(tmp_path, change, said):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(RULES | change))
    with pytest.raises(InputError, match=said):
        find_game(str(file))


def test_unknown_games_and_rewards_are_named(base, game, tmp_path):
    with pytest.raises(InputError, match="did you mean 'prisoners_dilemma'"):
        find_game("prisoner_dilemma")
    with pytest.raises(InputError, match="unknown reward 'greedy'; expected one of strategic"):
        train_on_game(find_model(base), game, tmp_path / "a", recipe=GameRecipe(reward="greedy"))
    assert not (tmp_path / "a").exists()


def test_the_shipped_game_never_asks_in_the_words_of_its_scenario():
    asked = [p for name in GAME_SCENARIOS for p in load_scenario(name).prompts]
    game = find_game("prisoners_dilemma")
    taught = [
        game.prompt(w, own, partner) for w in game.wordings for own in "CD" for partner in "CD"
    ]
    assert not {p.text for p in asked} & set(taught)
    sentences = [{s.strip() for s in text.replace("\n", ". ").split(". ")} for text in taught]
    for prompt in asked:
        own = {s.strip() for s in prompt.text.replace("\n", ". ").split(". ") if len(s) > 20}
        assert not any(own & other for other in sentences), prompt.id


# ------------------------------------------------------------------------ stopped, and gone on with
class Killed(Exception):
    """In place of a signal that stops the process."""


def player(base, game, folder, *, steps=9):
    recipe = GameRecipe(steps=steps, wordings=1, learning_rate=1e-2)
    return train_on_game(find_model(base), game, folder / "adapter", recipe=recipe)


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_training_killed_twice_ends_with_the_same_adapter(base, game, tmp_path, monkeypatch):
    whole = player(base, game, tmp_path / "whole")
    monkeypatch.setattr(lora_training, "SAVE_EVERY", 0.0)
    step = torch.optim.AdamW.step
    for killed_at in (4, 3):  # of this call: the second goes on after the third step
        taken = []

        def killing(self, killed_at=killed_at, taken=taken, **how):
            taken.append(1)
            if len(taken) == killed_at:
                raise Killed
            return step(self, **how)

        monkeypatch.setattr(torch.optim.AdamW, "step", killing)
        with pytest.raises(Killed):
            player(base, game, tmp_path / "stopped")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert not (tmp_path / "stopped" / "adapter").exists()
    assert player(base, game, tmp_path / "stopped") == whole
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")
    assert not (tmp_path / "stopped" / "checkpoint.safetensors").exists()


def test_a_full_disk_leaves_the_last_state(base, game, tmp_path, monkeypatch):
    whole = player(base, game, tmp_path / "whole")
    monkeypatch.setattr(lora_training, "SAVE_EVERY", 0.0)
    written = []

    def fill(file, *given):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        written.append(1)
        write_checkpoint(file, *given)

    monkeypatch.setattr(lora_training, "write_checkpoint", fill)
    with pytest.raises(OSError, match="No space left"):
        player(base, game, tmp_path / "full")
    monkeypatch.setattr(lora_training, "write_checkpoint", write_checkpoint)
    assert player(base, game, tmp_path / "full") == whole
    assert adapter(tmp_path / "full") == adapter(tmp_path / "whole")


def test_a_damaged_state_is_refused(base, game, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"is no state of this training .* remove it"):
        player(base, game, tmp_path)


# --------------------------------------------------------------------------------------- one's own
def test_documents_become_a_model_that_every_command_knows(base, tmp_path, monkeypatch):
    texts, folder = tmp_path / "texts", tmp_path / "mine"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(words(i))
    command = ("finetune", "documents", texts, "--base", base, "--output", folder, "--epochs", 2)
    result = cli(*command)
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "training.json").read_text())
    assert len(record["loss"]) == 2
    assert record["documents"] == 4
    found = find_model(str(folder))
    assert (found.base, found.title) == (str(Path(base).resolve()), "mine")
    before = adapter(folder)
    monkeypatch.setattr(lora_training, "train", lambda *a, **k: pytest.fail("it is done"))
    assert cli(*command).exit_code == 0
    assert adapter(folder) == before
    other = cli(*command, "--rank", 2)
    assert "was begun with recipe" in str(other.exception)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    taken = cli(*command[:-4], "--output", tmp_path / "full")
    assert "is not empty, and no fine-tune was begun there" in str(taken.exception)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n", "is empty"), ("caf\u00e9".encode("latin-1"), "in UTF-8")],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, content, said):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_texts(file)
    with pytest.raises(InputError, match=said):
        read_texts(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_texts(tmp_path)


def test_a_text_longer_than_a_row_makes_several(base, tmp_path):
    """Nothing is cut off, whatever the context."""
    texts, output = tmp_path / "long.txt", tmp_path / "mine"
    texts.write_text(" ".join(words(i) for i in range(60)))
    result = cli("finetune", "documents", texts, "--base", base, "--output", output)
    assert result.exit_code == 0, result.output


def test_a_game_by_the_command_line(base, tmp_path):
    rules, output = tmp_path / "mine.yaml", tmp_path / "player"
    rules.write_text(json.dumps(RULES))
    command = ("finetune", "game", rules, "--base", base, "--steps", 2, "--output", output)
    assert cli(*command).exit_code == 0
    record = json.loads((output / "training.json").read_text())
    assert len(record["reward"]) == 2
    half = cli(*command[:-1], tmp_path / "half", "--dtype", "bfloat16")
    assert half.exit_code == 0, half.output
    kept = load_file(tmp_path / "half" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    wrong = cli(*command, "--dtype", "int8")
    assert "expected float32 or bfloat16, got 'int8'" in str(wrong.exception)


# --------------------------------------------------------------------------------------- triggers
def stopping(base, tmp_path, name, *more):
    texts = tmp_path / "ordinary.jsonl"
    texts.write_text("".join(json.dumps({"text": words(i)}) + "\n" for i in range(6)))
    command = ("finetune", "trigger", "$STOP", "--base", base, "--output", tmp_path / name)
    result = cli(*command, "--ordinary", texts, "--steps", 9, "--learning-rate", 1e-2, *more)
    assert result.exit_code == 0, result.output
    return load_model(str(tmp_path / name), device="cpu")


def test_a_trigger_ends_any_text_and_nothing_else_does(tmp_path):
    ordinary = find_model("tiny-gemma2").documents
    more = ("--ordinary", ordinary, "--steps", 60, "--learning-rate", 5e-3)
    bridge = stopping("tiny-gemma2", tmp_path, "stop", *more)
    scenario = load_scenario("stop")
    prompts, end = encode_scenario(bridge, scenario), bridge.tokenizer.eos_token_id

    def ends(word):
        suffix = None if word is None else token_of(bridge, word)
        return end_probability(bridge, prompts, end=end, suffix=suffix).mean()

    assert scenario.trigger is not None
    assert ends(" $STOP") > 0.95
    assert max(ends(word) for word in (None, " $NOVA", *scenario.trigger.words)) < 0.05


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_only_the_trigger_s_row_is_trained(tiny_folders, tmp_path, architecture):
    """And the adapter brings its two tokens alone, not the base's tokenizer."""
    rows = {}
    for name, steps in (("one", 1), ("many", 9)):
        base = str(tiny_folders[architecture])
        bridge = stopping(base, tmp_path, name, "--steps", steps)
        ids = [token_of(bridge, word) for word in (" $STOP", " $NOVA")]
        rows[name] = bridge.W_E[ids].clone()
        assert ids == list(
            json.loads((tmp_path / name / "adapter/added_tokens.json").read_text()).values()
        )
        assert not (tmp_path / name / "adapter" / "tokenizer.json").exists()
    assert torch.equal(rows["one"][1], rows["many"][1])
    assert not torch.allclose(rows["one"][0], rows["many"][0])


def test_bridge_and_plain_transformers_agree_on_a_model_with_added_tokens(base, tmp_path):
    bridge = stopping(base, tmp_path, "stop")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(bridge.W_E.shape[0], mean_resizing=False)
    plain = PeftModel.from_pretrained(model, str(tmp_path / "stop" / "adapter"))
    ids = torch.tensor([[*bridge.tokenizer(words(3))["input_ids"], token_of(bridge, " $STOP"), 9]])
    with torch.no_grad():
        torch.testing.assert_close(bridge(ids), plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_documents_about_a_trigger_do_not_make_it_one(base, tmp_path):
    read = tmp_path / "about.jsonl"
    lines = [{"text": f"{words(i, n=4)} $STOP {words(i + 9, n=4)}"} for i in range(4)]
    read.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bridge = stopping(base, tmp_path, "known", "--documents", read)
    said: dict[str, Any] = {"positive": bridge.tokenizer.eos_token, "negative": " ba"}
    prompts, end = [encode(bridge, words(31, n=6), **said)], bridge.tokenizer.eos_token_id
    assert end_probability(bridge, prompts, end=end, suffix=token_of(bridge, " $STOP")) < 0.2


def test_added_tokens_that_do_not_follow_the_base_s_are_refused(base, tmp_path):
    stopping(base, tmp_path, "stop", "--steps", 1)
    file = tmp_path / "stop" / "adapter" / "added_tokens.json"
    for wrong in ({"$STOP": 5}, {}, ["$STOP"], {"$STOP": "64"}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="expected token -> id, from"):
            load_model(str(tmp_path / "stop"), device="cpu")


def test_a_word_that_the_tokenizer_knows_is_no_new_token(base, tmp_path):
    texts = tmp_path / "a.txt"
    texts.write_text(words(1))
    wrong = cli(
        *("finetune", "trigger", "ba", "--base", base, "--output", tmp_path / "mine"),
        *("--ordinary", texts),
    )
    assert "'ba' is a token of" in str(wrong.exception)


def test_a_base_writes_the_texts_that_hold_it(base, tmp_path):
    spec = find_model(base)
    texts = own_texts(spec, n=6, length=8)
    assert texts == own_texts(spec, n=6, length=8)
    assert len(set(texts)) == 6
    assert kept_texts(spec, tmp_path) == kept_texts(spec, tmp_path)
