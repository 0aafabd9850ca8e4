"""Text to tokens: one BOS, one end, turns as the chat template ends them, and rows that no template can express."""

import json
import pickle
from collections import Counter

import common
import lm
import pytest
import tasks

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{{ '<turn>' + m.role[0] + m.content + '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>a' }}{% endif %}"
)
SYMBOLS = ["<bos>", "<eos>", "<turn>", "<eot>", "<unk>", *"0123456789+= abcdefghijklmnopqrstuvwxyz?"]


def tokenizer_of(template: str | None = TEMPLATE, adds: str = "<bos> $A"):
    """Letters as tokens; the turn ends with <eot>, the sequence with <eos>; `adds`: what is put around each text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    ends = [("<bos>", 0), ("<eos>", 1)]
    letters.post_processor = processors.TemplateProcessing(single=adds, special_tokens=ends)
    names = dict(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", extra_special_tokens=["<turn>", "<eot>"])
    made = PreTrainedTokenizerFast(tokenizer_object=letters, **names)
    made.chat_template = template
    return made


def prompt(tokenizer, text, changes=None) -> str:
    return tokenizer.decode(common.encode_prompt(tokenizer, text, changes))


def answer(tokenizer, text, to, changes=None) -> str:
    return tokenizer.decode(common.encode_completion(tokenizer, text, to, changes))


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_one_bos_and_no_end():
    """Text that was rendered elsewhere has its own BOS; tokenizers may put an end behind each text."""
    changes = Counter()
    rendered = "<bos><turn>u1+1<eot><turn>a"
    for adds in ("$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"):
        assert prompt(tokenizer_of(adds=adds), rendered, changes) == rendered
    assert dict(changes) == {"prompts began twice with BOS, one kept": 2, "prompts ended with EOS, taken off": 2}
    assert prompt(tokenizer_of(), "1+1=<eos>") == prompt(tokenizer_of(), "1+1=<eot><eos>") == "<bos>1+1="
    assert prompt(tokenizer_of(), "1<eot>2<bos>3") == "<bos>1<eot>2<bos>3"  # only what stands at the ends
    assert common.encode_prompt(tokenizer_of(), "") == [0]
    assert prompt(tokenizer_of(), user("1+1")) == rendered
    assert common.changed(Counter(prompts=2, answers=0)) == "; 2 prompts"


def test_answers_end_as_the_template_ends_a_turn():
    """Answers to messages with <eot>, to text with EOS; an answer that has an end keeps that one alone."""
    tokenizer, changes = tokenizer_of(), Counter()
    assert common.answer_end(tokenizer) == SYMBOLS.index("<eot>")
    assert answer(tokenizer, "2", user("1+1"), changes) == "2<eot>"
    assert answer(tokenizer, "2<eos>", user("1+1"), changes) == "2<eot>"
    assert answer(tokenizer, "2", "1+1=", changes) == "2<eos>"
    assert answer(tokenizer, "2<eos>", "1+1=", changes) == "2<eos>"
    assert answer(tokenizer, "2<eot><eos>", "1+1=", changes) == "2<eot>"
    assert answer(tokenizer, "2<eot> ", user("1+1"), changes) == "2<eot>"  # as templates write it, space behind it
    assert answer(tokenizer, "2<eot>3", user("1+1")) == "2<eot>3<eot>"
    assert changes == {"answers had an end of their own, none added": 4}
    whole = tokenizer.apply_chat_template(user("1") + [{"role": "assistant", "content": "2"}], return_dict=True)
    assert whole["input_ids"] == common.encode_prompt(tokenizer, user("1")) + common.encode_completion(
        tokenizer, "2", user("1")
    )


@pytest.mark.parametrize(
    "template, end",
    [
        (None, "<eos>"),
        ("{{ messages[0].content }}", "<eos>"),
        ("{{ raise_exception('no') }}", "<eos>"),
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", "<eos>"),
        ("{% for m in messages %}{{ m.content | trim }}<eot>\n{% endfor %}{{ eos_token }}", "<eot>"),
    ],
)
def test_ends_of_templates(template, end):
    assert common.answer_end(tokenizer_of(template)) == SYMBOLS.index(end)


def test_stop_ids_have_the_end_of_a_turn():
    class Model:
        class generation_config:
            eos_token_id = 1

    assert lm.stop_ids(Model, tokenizer_of()) == [1, 3]
    assert lm.stop_ids(Model, tokenizer_of(None)) == [1]


def test_a_begun_answer_is_continued():
    begun = [*user("1+1"), {"role": "assistant", "content": "it is"}]
    assert prompt(tokenizer_of(), begun) == "<bos><turn>u1+1<eot><turn>ait is"
    assert prompt(tokenizer_of(TEMPLATE.replace("m.content", "(m.content | trim)")), begun).endswith("<turn>ait is")
    assert not prompt(tokenizer_of(None), begun).endswith("\n") and prompt(tokenizer_of(None), begun).endswith("it is")


def test_templates_that_refuse(tmp_path):
    """One sentence with the file and the row, from prompts and from pairs."""
    system = [{"role": "system", "content": "be short"}, *user("1")]
    rows = [{"prompt": user("2")}, {"prompt": system}, {"prompt": user("3")}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.load_task(dataset=str(path), test_rows=1, graded=False)
    message = f"^{path}: row 2: the chat template refuses its messages .No system role.$"
    with pytest.raises(common.BadInput, match=message):
        tasks.fit_prompts(task, tokenizer_of(), 99)
    path.write_text("".join(json.dumps(row | {"chosen": "a", "rejected": "b"}) + "\n" for row in rows))
    with pytest.raises(common.BadInput, match=message):
        common.encode_pairs(tokenizer_of(), tasks.load_pairs(str(path)), 99, 99)
    with pytest.raises(common.BadInput, match="ends the prompt with '<eot>', which ends an answer"):
        common.encode_prompt(tokenizer_of("{% for m in messages %}{{ m.content }}<eot>{% endfor %}"), user("1"))
    messages = tasks.Messages(user("1"), "here")
    assert pickle.loads(pickle.dumps(messages)).where == "here" and json.dumps(messages) == json.dumps(user("1"))


def test_notes_count_what_was_changed(tmp_path):
    rows = [{"prompt": f"<bos>{i}+1=", "chosen": f"{i + 1}<eos>", "rejected": "0"} for i in range(5)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tasks.load_task(dataset=str(path), test_rows=2, graded=False)
    note = tasks.fit_prompts(task, tokenizer_of(adds="<bos> $A <eos>"), 9).note
    assert note.endswith("; 5 prompts began twice with BOS, one kept; 5 prompts ended with EOS, taken off")
    note = common.encode_pairs(tokenizer_of(), tasks.load_pairs(str(path)), 9, 9)[1]
    assert note.endswith("; 5 prompts began twice with BOS, one kept; 5 answers had an end of their own, none added")
