"""How texts begin and end: templates, BOS, and models that have neither; and logits of any size."""

from string import ascii_letters
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from interp_kit.analyses.activation_patching import identity_patch_error
from interp_kit.analyses.steering import continuations
from interp_kit.analyses.tuned_lens import text_rows
from interp_kit.catalogue import find_model
from interp_kit.decisions import check_noise, decide, noise_limit
from interp_kit.huggingface import TEMPLATE_DATE
from interp_kit.loading import load_model, load_models
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.prompts import encode, end_token, special_token, token_ids
from interp_kit.specs import InputError
from interp_kit.texts import own_texts
from tests.conftest import tiny_prompts
from tests.tiny import WORDS, save_tiny

SYSTEM = "{% for m in messages %} ba be {{ m['content'] }}{% endfor %}"
ANSWERED = SYSTEM + "{% if add_generation_prompt %} bi{% endif %}"
DATED = "on {{ strftime_now('%d %b %Y') }}" + ANSWERED


def save_spec(place, **spec):
    place.mkdir(parents=True, exist_ok=True)
    (place / "model.yaml").write_text(yaml.safe_dump(spec))
    return str(place)


def with_template(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    return save_tiny("llama", tmp_path / "weights")


# ------------------------------------------------------------------------------------ templates
def test_the_setting_of_the_spec_holds_in_the_bridge(folder, tmp_path):
    with_template(folder, ANSWERED)
    text = " da de"
    for wanted, expected in ((False, text), (True, " ba be da de bi")):
        name = save_spec(tmp_path / str(wanted), base=str(folder), chat_template=wanted)
        bridge = load_model(name, device="cpu")
        prompt = encode(bridge, text, positive=" ba", negative=" ku")
        assert prompt.text.replace("  ", " ") == expected
        looked_at = encode(inspect_model(find_model(name)), text, positive=" ba", negative=" ku")
        assert looked_at.tokens == prompt.tokens
        assert bool(prompt.tokens[0] == 2) != wanted  # this template gives no BOS


@pytest.mark.parametrize("first", ["base", "tuned"])
def test_an_adapters_template_is_its_own_whoever_is_loaded_first(folder, tmp_path, first):
    with_template(folder, ANSWERED)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "tuned" / "adapter")
    (tmp_path / "tuned" / "adapter" / "chat_template.jinja").write_text(
        ANSWERED.replace("ba be", "ka ke")
    )
    base = save_spec(tmp_path / "base", base=str(folder), chat_template=True)
    tuned = save_spec(tmp_path / "tuned", base=str(folder), adapter="adapter", chat_template=True)
    loaded = load_models([base, tuned], device="cpu")
    loaded.switch({"base": base, "tuned": tuned}[first])
    for name, words in ((base, "ba be"), (tuned, "ka ke"), (base, "ba be")):
        prompt = encode(loaded.switch(name), " da", positive=" ba", negative=" ku")
        assert words in prompt.text
        assert (
            prompt.tokens
            == encode(
                inspect_model(loaded.specs[name]), " da", positive=" ba", negative=" ku"
            ).tokens
        )


def test_a_template_with_a_date_gives_the_same_prompt_on_every_day(folder, tmp_path):
    with_template(folder, DATED)
    name = save_spec(tmp_path / "m", base=str(folder), chat_template=True)
    prompt = encode(load_model(name, device="cpu"), " da", positive=" ba", negative=" ku")
    assert TEMPLATE_DATE.strftime("%d %b %Y") in prompt.text


def test_segments_are_found_in_the_prompt_and_not_in_the_template(folder, tmp_path):
    with_template(folder, ANSWERED)
    bridge = load_model(
        save_spec(tmp_path / "m", base=str(folder), chat_template=True), device="cpu"
    )
    prompt = encode(
        bridge, " da ba be ka", positive=" ba", negative=" ku", segments={"part": "ba be"}
    )
    words = bridge.tokenizer.convert_ids_to_tokens(list(prompt.tokens))
    assert [words[at] for at in prompt.segments[0].positions] == ["Ġba", "Ġbe"]
    assert min(prompt.segments[0].positions) > words.index("Ġda")


def test_prompts_are_read_as_written_where_they_say_so(folder, tmp_path):
    """Special tokens that the text spells are tokens, BOS is the model's, segments are found."""
    with_template(folder, ANSWERED)
    bridge = load_model(
        save_spec(tmp_path / "m", base=str(folder), chat_template=True), device="cpu"
    )
    plain = load_model(
        save_spec(tmp_path / "plain", base=str(folder), chat_template=False), device="cpu"
    )
    for text in (" da ba be ka", " da<eos> ba be ka"):
        given = {"positive": " ba", "negative": " ku", "segments": {"part": "ba be"}}
        prompt = encode(bridge, text, counterfactual=text, chat_template=False, **given)
        assert prompt == encode(plain, text, counterfactual=text, **given)
        assert prompt.tokens != encode(bridge, text, **given).tokens
    assert bridge.tokenizer.eos_token_id in prompt.tokens


def test_the_metric_predicts_what_is_sampled_after_a_chat_template(folder, tmp_path):
    with_template(folder, ANSWERED)
    name = save_spec(tmp_path / "m", base=str(folder), chat_template=True)
    bridge = load_model(name, device="cpu")
    plain: Any = load_huggingface(find_model(name), device="cpu")
    turn = [{"role": "user", "content": " da de"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    ids = asked["input_ids"]
    with torch.no_grad():
        order = plain(ids).logits[0, -1].argsort(descending=True).tolist()
    # Letters, since a reply begins without a space.
    first, second = [w for t in order if (w := tokenizer.decode([t])) in set(ascii_letters)][:2]
    prompt = encode(bridge, " da de", positive=first, negative=second)
    n, generator = 200_000, torch.Generator().manual_seed(0)
    with torch.no_grad():  # one new token of n generations at temperature 1
        drawn = plain(ids).logits[0, -1].softmax(-1).multinomial(n, True, generator=generator)
    expected = decide(bridge, [prompt]).iloc[0]
    counts = [int((drawn == t).sum()) for t in (prompt.positive[0], prompt.negative[0])]
    assert prompt.tokens == tuple(ids[0].tolist())
    for hits, of, p in (
        (sum(counts), n, expected.answer_mass),
        (counts[0], sum(counts), expected.p_positive),
    ):
        assert of > 100
        assert stats.binomtest(hits, of, p).pvalue > 1e-3


# ------------------------------------------------------------------------ neither BOS nor EOS
@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model whose tokenizer has no special token at all."""
    folder = save_tiny("gpt2", tmp_path_factory.mktemp("bare") / "weights")
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" " + " ".join(WORDS)] * 2, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def test_a_model_without_special_tokens_gets_none(bare):
    assert special_token(bare, "bos") is None
    assert special_token(bare, "eos") is None
    text = " ba be"
    plain = bare.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(token_ids(bare, text)) == plain
    assert text_rows(bare, [text]) == [tuple(plain)]
    prompts = [encode(bare, " ba be bi", positive=" ka", negative=" ke")]
    assert decide(bare, prompts).value.abs().item() > 0
    table = continuations(bare, prompts, torch.ones(32), layer=1, strengths=[0.0, 1.0],
                          max_new_tokens=3)  # fmt: skip
    assert len(table) == 2


def test_what_needs_a_beginning_or_an_end_says_so(bare):
    with pytest.raises(InputError, match="neither a beginning nor an end of text"):
        own_texts(bare, 4, length=8)
    with pytest.raises(InputError, match="no token that ends a text"):
        end_token(bare)


# ------------------------------------------------------------------------ logits of any size
@pytest.mark.parametrize("scale", [1, 3, 30])
def test_a_model_with_larger_logits_passes_like_its_twin(tmp_path, scale):
    folder = save_tiny("llama", tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    model.save_pretrained(folder)
    bridge = load_model(str(folder), device="cpu")
    prompts = tiny_prompts(bridge)
    check_noise(identity_patch_error(bridge, prompts), noise_limit(bridge, prompts, most=1e-5))
    with pytest.raises(InputError, match="above its limit of"):
        check_noise(0.1 * scale, noise_limit(bridge, prompts))
    with pytest.raises(InputError, match="above its limit of"):
        check_noise(float("nan"), noise_limit(bridge, prompts))
