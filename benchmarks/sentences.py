"""A task with many right answers that a program can grade: one sentence with two given words.

    python benchmarks/sentences.py runs/sentences.jsonl             # 4,851 prompts, shuffled
    python lco.py --model runs/smollm2 --dataset runs/sentences.jsonl --reward_file benchmarks/sentences.py
    python benchmarks/sentences.py frames runs/e/samples.jsonl      # of evaluate.py: are right answers one template?

An answer is right when it is one sentence of 6 to 14 words with both words, a verb of the list below, no word more than
twice and no two-word phrase twice. Looser graders are hacked: without the verb and the length, "A snake and a box." is
what training ends with. Meaning is not graded, so "A cup is a type of cake." is right too: count the frames.
"""

import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

NOUNS = """
apple baby ball bank beach bear bed bell bird boat book bottle box bread bridge brother bus cake camera candle car
castle cat chair child church city clock cloud coat coffee cow cup dance desk doctor dog door dress egg farm farmer
fire fish flower forest friend garden girl glass gold grass hat hill horse house ice island jacket key kitchen knife
ladder lake lamp leaf letter library lion map market milk mirror money moon mother mountain mouse ocean paper park
pencil piano pig queen rain river road rock sailor school shoe snake star table teacher train tree window
""".split()
VERBS = set(
    """
like liked is are was were be been has have had do does did can could will would may might must should
ate bought broke brought built came carried caught chased climbed closed cooked crossed cut danced drank drew drove fell hid
felt flew forgot found gave gets goes grew heard held helped hid jumped kept knew left lived looked lost loved made met
moved needed opened painted played pulled pushed put ran reached read returned saw sang sat says seemed sent showed slept
sold spoke stood stopped swam talked threw told took tried turned used visited waited walked wanted watched went wore wrote
asks brings carries catches climbs comes eats falls feels finds flies follows gives grows hangs holds jumps keeps knows
leads leaves lies likes lives looks loves makes moves needs opens plays pulls puts reads rides rolls runs sees seems sells
shines shows sings sits sleeps smells stands stays stops swims takes talks tells tries turns uses waits walks wants watches
wears works writes
""".split()
)


def right(words: list[str], text: str) -> bool:
    """Whether a text is one sentence, as above, with these words."""
    text = text.strip()
    if not re.fullmatch(r"[A-Z][a-zA-Z ,'’-]+[.!]", text):
        return False
    found = [word.strip("'’-") for word in re.findall(r"[a-z'’-]+", text.lower())]
    phrases = Counter(itertools.pairwise(found))
    return (
        6 <= len(found) <= 14
        and all(word in found or {word, word + "s", word + "es"} & set(found) for word in words)
        and bool(VERBS & set(found))
        and max(Counter(found).values()) <= 2
        and max(phrases.values()) == 1
    )


def reward(prompts: list, completions: list[str], rows: list[dict]) -> list[float]:
    return [float(right(row["words"], text)) for text, row in zip(completions, rows, strict=True)]


def frame(prompt: list[dict], text: str) -> str:
    """A text without the two words that its prompt asks for: answers from one template have one frame."""
    words = "|".join(re.findall(r'"(\w+)"', prompt[-1]["content"]))
    return re.sub(rf"\b({words})(s|es)?\b", "_", text.strip().lower())


def tell_frames(file: Path) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "eval/greedy"]
    frames = Counter(frame(row["prompt"], row["completion"]) for row in rows if row["right"])
    print(f"{frames.total()} of {len(rows)} greedy answers are right, in {len(frames)} frames; the most frequent:")
    for words, n in frames.most_common(3):
        print(f"  {n:3}  {words}")


def main() -> None:
    if sys.argv[1] == "frames":
        return tell_frames(Path(sys.argv[2]))
    pairs = list(itertools.combinations(NOUNS, 2))
    random.Random(0).shuffle(pairs)
    ask = 'Write one short sentence with the words "{}" and "{}".'
    rows = [{"prompt": [{"role": "user", "content": ask.format(a, b)}], "words": [a, b]} for a, b in pairs]
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    if len(sys.argv) != 2 + (sys.argv[1:2] == ["frames"]):
        sys.exit(__doc__)
    main()
