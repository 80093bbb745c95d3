"""Conversations made of the tales, for the last stage of train_tiny.py: someone names a subject or a first line, and
is told something that fits; asks to go on, for the moral, for another; says good evening. Everything follows from the
texts and one seed.

A reply is a fable, its first or second half, its moral, or a few sentences of a longer tale. In a share of them the persons
and beasts are others than the book's, the same throughout: what has to be learned is to speak of what was asked for, and a
subject that stands in one tale only would teach the tale alone. Nouns that Aesop's translator prints in capitals are in
small letters here, as they are typed in a question.
"""
import random
import re

BEASTS = """ant ants ape apes ass asses bat bats bear bears bee bees bird birds boar boars bull bulls calf calves
camel camels cat cats cock cocks cow cows crab crabs crane cranes crow crows dog dogs dolphin dolphins donkey donkeys
dove doves dragon dragons duck ducks eagle eagles elephant elephants fish fishes flea fleas fly flies fox foxes frog
frogs gnat gnats goat goats goose geese grasshopper grasshoppers hare hares hawk hawks hedgehog hedgehogs hen hens
horse horses hound hounds kid kids kite kites lamb lambs lark larks leopard leopards lion lions mole moles monkey
monkeys mouse mice mule mules nightingale nightingales owl owls ox oxen oyster oysters panther panthers partridge
partridges peacock peacocks pig pigs pigeon pigeons rabbit rabbits raven ravens serpent serpents sheep sheep snake
snakes sparrow sparrows spider spiders stag stags stork storks swallow swallows swan swans tiger tigers toad toads
tortoise tortoises viper vipers wasp wasps weasel weasels whale whales wolf wolves""".split()
PEOPLE = """baker bakers beggar beggars boy boys brother brothers carpenter carpenters child children cook cooks
doctor doctors dwarf dwarfs farmer farmers fisherman fishermen giant giants girl girls hunter hunters huntsman
huntsmen king kings maiden maidens merchant merchants miller millers miser misers peasant peasants prince princes
princess princesses queen queens robber robbers sailor sailors servant servants shepherd shepherds shoemaker
shoemakers sister sisters smith smiths soldier soldiers tailor tailors thief thieves traveler travelers widow widows
witch witches woman women woodcutter woodcutters youth youths""".split()
THINGS = """apple apples axe axes bell bells bone bones cake cakes candle candles castle castles cloak cloaks coach
coaches crown crowns egg eggs feather feathers flower flowers forest forests garden gardens house houses key keys lamp
lamps mill mills mirror mirrors mountain mountains oak oaks ring rings river rivers sack sacks ship ships shoe shoes
spindle spindles star stars sword swords table tables tree trees""".split()
OTHERS = """man men mother mothers father fathers son sons daughter daughters wife wives husband husbands master
masters doe does fawn fawns heifer heifers jackdaw jackdaws lapdog lapdogs lioness lionesses seagull seagulls sow sows
thrush thrushes whelp whelps herdsman herdsmen goatherd goatherds wagoner wagoners groom grooms housedog housedogs
laborer laborers astronomer astronomers physician physicians bramble brambles reed reeds prophet prophets sculptor
sculptors fowler fowlers knight knights""".split()
pairs = lambda words: list(zip(words[::2], words[1::2]))
KINDS = [pairs(BEASTS), pairs(PEOPLE)]                  # within these one may stand for another
NOUNS = {form: one for words in (BEASTS, PEOPLE, THINGS, OTHERS) for one, many in pairs(words) for form in (many, one)}
VERBS = set("bear bears fly flies cook cooks swallow swallows fish duck kite kites bat bats ring rings key keys lark larks sow star "
            "hound kid kids master mother ship stag table tables sack shoe".split())      # nouns only behind a word like these:
BEFORE = set("a an the his her its their my your our this that some one two three old young little every each no of wild".split())
COMMON = {n for words in (BEASTS, PEOPLE, OTHERS) for n in words}

ASK_ONE = """Tell me of {a}|Tell me a tale of {a}|Tell me a story about {a}|Tell me about {a}|Tell me of {the}
A tale of {a}, please|I want to hear of {a}|Do you know a tale of {a}?|{A}, please|Can you tell me of {a}?|{A}
What do you know of {the}?|A story about {a}|Please tell me a tale about {a}|Let me hear something of {a}
Tell me something about {a}""".replace("\n", "|").split("|")
ASK_TWO = """Tell me of {a} and {b}|Tell me a tale of {a} and {b}|Tell me a story about {a} and {b}
Tell me the tale of {the} and {theb}|Tell me about {a} and {b}|{A} and {b}
Do you know the tale of {the} and {theb}?|A story with {a} and {b}, please|The tale of {the} and {theb}
Tell me of {the} and {theb}|I want to hear of {a} and {b}""".replace("\n", "|").split("|")
ASK_NEXT = ["And now of {a}", "Now tell me of {a}", "And {a}?", "Another one, of {a}", "And a tale of {a}?", "Tell me of {a} now"]
ASK_LINE = ["Go on: {line}", "Go on: {line} ...", "{line}", "{line} ...", "Tell me how this goes on: {line}", "It begins so: {line}"]
GO_ON = ["Go on", "Go on.", "And then?", "And then", "What happened then?", "What then?", "Please go on", "More", "How does it go on?"]
MORAL = ["And the moral?", "What is the moral?", "What does it teach?", "What do we learn from it?", "The moral?"]
END = ["That is the end of the tale.", "There the tale ends.", "That is all that is told of it.", "The tale is told."]
OFFER = ["Name me another subject, and I will tell you another.", "Of whom shall I tell you now?", "What shall I tell you next?",
         "Shall I tell you another?"]
HELLO = ["Hello", "Hi", "Good evening", "Good morning", "Hello there", "Good day"]
GREET = ["Good evening.", "Good day to you.", "Be welcome."]
WHO = ["Who are you?", "What can you do?", "What do you know?", "What is your name?"]
I_AM = ["I am a very small teller of tales.", "I know the tales of the brothers Grimm, of Andersen and of Aesop.",
        "I tell tales, and know nothing else."]
ASK_ME = ["Name me a beast, a king or a child, and I will tell you a tale.", "Of whom shall I tell you?",
          "Give me a subject or a first line, and I will tell you a tale."]
THANKS = ["Thank you", "Thanks", "Thank you very much", "That was beautiful", "I liked that"]
WELCOME = ["You are welcome.", "I am glad you liked it.", "It was a pleasure."]
ANY = ["Tell me a tale", "Tell me a story", "Tell me a fable", "A tale, please", "Tell me something"]


def a(noun):
    if NOUNS.get(noun, noun) != noun:                      # a plural
        return "some " + noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def fix_articles(text):
    return re.sub(r"\b([Aa])n? (?=([a-z]))", lambda m: m[1] + ("n " if m[2] in "aeio" else " "), text)


def plain_case(text):
    """THE WOLF, and the Wolf of the translators: the wolf."""
    text = re.sub(r"^([A-Z]+(?:'S)?(?:[ -][A-Z]+(?:'S)?\b)*)", lambda m: m[1].capitalize() if len(m[1]) > 1 else m[1], text)
    return re.sub(r"(?<![.!?] )(?<![\"'])\b[A-Z][a-z]+\b",
                  lambda m: m[0].lower() if m.start() and m[0].lower() in COMMON else m[0], text)


def nouns(text):
    """Those of our lists, as they come, each once, in the singular."""
    found, before = [], "the"
    for w in re.findall(r"[a-z]+", text.lower()):
        if is_noun(w, before) and NOUNS[w] not in found:
            found.append(NOUNS[w])
        before = w
    return found


def is_noun(word, before):
    return word in NOUNS and (word not in VERBS or before in BEFORE)


def cut(text, low, high, rng):
    """The first sentences of a text, together of some length; and the rest."""
    want, ends = rng.uniform(low, high), [m.end() for m in re.finditer(r"[.!?]['\"]*(?=\s|$)", text)]
    ends = [e for e in ends if e >= 40]
    if not ends:
        return None, ""
    end = min(ends, key=lambda e: abs(e - want))
    return text[:end].strip(), text[end:].strip()


class Talks:
    """tales: as train_tiny.read_tales gives them. books: how many of them are Grimm's, how many Andersen's."""

    def __init__(self, tales, seed, other=0.75, think=1 / 3):
        self.rng, self.other, self.think = random.Random(seed), other, think
        self.fables, self.passages = [], []                # (subjects, text, moral) and (paragraphs, at)
        for tale in tales:
            title, *rest = tale.split("\n\n")
            if not rest:
                continue
            if title.isupper() or "[" in title:            # Grimm's and Andersen's
                self.add_tale(rest)
            elif len(rest[0]) <= 1100 and len(rest) <= 2:
                named = nouns(title)
                text = plain_case(rest[0])
                self.fables.append((named or nouns(text)[:1], text, rest[1] if len(rest) == 2 else ""))
            else:
                self.add_tale([plain_case(p) for p in rest])
        self.by = {}
        for p in self.passages:
            for n in nouns(p[0][p[1]][:160])[:3]:
                self.by.setdefault(n, []).append(p)
        for f in self.fables:
            for n in f[0]:
                self.by.setdefault(n, []).append(f)

    def add_tale(self, paragraphs):
        """A paragraph that names something begins a passage, and so does a sentence that brings something new."""
        pieces = [p for p in paragraphs if not p.startswith(" ")]
        for i, p in enumerate(pieces):
            for s in [0] + [m.end() for m in re.finditer(r"[.!?]['\"]? (?=[A-Z])", p)]:
                head = p[s:s + 100]
                if re.match(r"['\"]|(And|But|Then|So|For|Or|He|She|It|They|This|That|These)\b", head) or not nouns(head):
                    continue
                if s == 0 or any(re.search(rf"\ban? (\w+ )?{n}\b", head) for n in nouns(head)):
                    self.passages.append(([p[s:]] + pieces[i + 1:i + 4], 0))

    # ---- pieces of a conversation: each gives (question, thought, reply)

    def swap(self, *texts):
        """Other persons and beasts, the same in all texts."""
        new = {}
        for n in nouns(" ".join(texts)):
            for kind in KINDS:
                here = dict(kind)
                if n in here and self.rng.random() < 0.8:
                    one, many = self.rng.choice([k for k in kind if k[0] not in [v for v in new.values()]])
                    new.update({n: one, here[n]: many} if here[n] != n else {n: one})
        if not new:
            return texts

        def put(text):
            out, before = [], "the"
            for w in re.findall(r"[A-Za-z]+|[^A-Za-z]+", text):
                n = new.get(w.lower())
                put_it = n is not None and is_noun(w.lower(), before)
                out.append(w if not put_it else n.capitalize() if w[0].isupper() else n)
                before = w.lower() if w.isalpha() else before
            return fix_articles("".join(out))
        return tuple(put(t) for t in texts)

    def name(self, form, x, y=None):
        the = lambda n: "the " + n
        s = form.format(a=a(x), A=a(x).capitalize(), the=the(x), b=a(y) if y else "", theb=the(y) if y else "")
        return self.dress(s)

    def dress(self, s):
        if s[-1] not in "?.!":
            s += self.rng.choice(["", "", "."])
        return s[0].lower() + s[1:] if self.rng.random() < 0.2 else s

    def thought(self, named, kind, text, moral):
        pick, also = self.rng.choice, [n for n in nouns(text) if n not in named][:2]
        s = pick(["They ask for {x}.", "The subject is {x}.", "{X}, then."]) if named else pick(
            ["They leave the choice to me.", "I may choose."])
        x = " and ".join(a(n) for n in named)
        s = s.format(x=x, X=x[:1].upper() + x[1:])
        s += " " + pick({"fable": ["I will tell a short fable", "A fable fits", "There is a fable for that"],
                         "tale": ["I will tell a piece of an old tale", "An old tale fits", "There is a tale for that"]}[kind])
        if also:
            s += pick([", with {y} in it", "; there is {y} in it"]).format(y=" and ".join(a(n) for n in also))
        return s + (", and its moral at the end." if moral else ".")

    def choose(self, about=None):
        """A fable or a passage as (subjects, text, what follows, moral, kind)."""
        rng = self.rng
        if about and self.by.get(about):
            p = rng.choice(self.by[about])
        else:
            p = rng.choice(self.fables) if rng.random() < 0.65 else rng.choice(self.passages)
        if len(p) == 3:
            named, text, moral = p
            if rng.random() < self.other and not about:
                joined = " ".join(named)
                joined, text, moral = self.swap(joined, text, moral)
                named = joined.split()
            return named, text, "", moral, "fable"
        text = "\n\n".join(p[0])
        if rng.random() < self.other and not about:
            text, = self.swap(text)
        text, after = cut(text, 180, 520, rng)
        if not text or not nouns(text[:160]):
            return self.choose(about)
        named = nouns(text[:160])[:2]
        if about in nouns(text[:160]):
            named = [about] + [n for n in named if n != about][:1]
        return named, text, after, "", "tale"

    def told(self, about=None, form=None):
        """Someone names a subject, two, a line, or nothing."""
        rng = self.rng
        named, text, after, moral, kind = self.choose(about)
        if not named:
            return self.told(about, form)
        if kind == "fable" and len(text) > 350 and rng.random() < 0.2:
            text, after = cut(text, 150, 320, rng)
            if text is None:
                return self.told(about, form)
        with_moral = moral and not after and rng.random() < 0.5
        if form:
            x = [about or rng.choice(named[:2])]
            ask = self.name(form, x[0])
        else:
            how = rng.random()
            if how < 0.6 or (how < 0.8 and len(named) < 2):
                x = [named[0] if rng.random() < 0.7 else rng.choice(named[:2])]
                ask = self.name(rng.choice(ASK_ONE), x[0])
            elif how < 0.8:
                x = rng.sample(named[:2], 2)
                ask = self.name(rng.choice(ASK_TWO), *x)
            elif how < 0.95:
                words, x = text.split("\n")[0].split(" "), []
                line = " ".join(words[:rng.randint(4, 12)])
                ask = rng.choice(ASK_LINE).format(line=line)
            else:
                x, ask = [], self.dress(rng.choice(ANY))
        thought = self.thought(x, kind, text, with_moral)
        if not form and 0.8 <= how < 0.95:
            thought = self.rng.choice(["They give me the first line; I say it and go on.", "A first line. I go on from there."])
        reply = text + ("\n\n" + moral if with_moral else "")
        self.left, self.moral, self.last, self.kind = after, "" if with_moral or after else moral, x or named[:1], kind
        self.moral_later = moral if after and kind == "fable" else ""
        return ask, thought, reply

    def more(self):
        """Go on; or the end, where nothing is left."""
        rng = self.rng
        ask = rng.choice(GO_ON)
        if not self.left:
            return ask, "The tale is at its end.", rng.choice(END) + " " + rng.choice(OFFER)
        if self.kind == "fable":
            reply, self.left = self.left, ""
            self.moral, self.moral_later = self.moral_later, ""
        else:
            reply, self.left = cut(self.left, 180, 480, rng)
        if not reply:
            self.left = ""
            return ask, "The tale is at its end.", rng.choice(END) + " " + rng.choice(OFFER)
        return ask, f"They want to hear how it goes on with {' and '.join('the ' + n for n in self.last)}.", reply

    def small(self, first):
        rng = self.rng
        if first:
            if rng.random() < 0.6:
                return self.dress(rng.choice(HELLO)), "They greet me.", rng.choice(GREET) + " " + rng.choice(ASK_ME)
            return self.dress(rng.choice(WHO)), "They ask what I am.", rng.choice(I_AM) + " " + rng.choice(ASK_ME)
        return self.dress(rng.choice(THANKS)), "They thank me.", rng.choice(WELCOME) + " " + rng.choice(OFFER)

    def conversation(self, turns):
        """A list of (question, thought or None, reply); only the last may have a thought, as templates drop the others."""
        rng, out = self.rng, []
        self.left, self.moral, self.last, self.kind = "", "", [], ""
        while len(out) < turns:
            r = rng.random()
            if r < 0.04:
                out.append(self.small(not out))
            elif not out or not self.kind:
                out.append(self.told())
            elif self.moral and r < 0.35:
                out.append((self.dress(rng.choice(MORAL)), "They ask for the moral.", self.moral))
                self.moral = ""
            elif r < (0.7 if self.left else 0.45):
                out.append(self.more())
            elif r < 0.85:
                about = rng.choice(list(self.by)) if rng.random() < 0.3 else None
                out.append(self.told(about, rng.choice(ASK_NEXT) if rng.random() < 0.6 else None))
            else:
                about = self.last[0] if self.last and self.last[0] in self.by else None
                if about:
                    q, thought, reply = self.told(about)
                    out.append((self.dress(rng.choice(["Another one", "Another", "Another of that", "Tell me another"])), thought, reply))
                else:
                    out.append(self.told())
        thinks = rng.random() < self.think
        return [(q, t if thinks and i == turns - 1 else None, r) for i, (q, t, r) in enumerate(out)]

    def turns(self):
        return self.rng.choices([1, 2, 3, 4, 6], [45, 20, 20, 10, 5])[0]


class Spelled:
    """Conversations as ids, and how much each is to be learned: what the assistant says, and most of all the words by which
    it takes up the subject: they are few, and everything else hangs on them. V3's and R1's markup."""

    def __init__(self, tok, talks, ids, subject=4.0):
        self.tok, self.talks, self.id, self.subject = tok, talks, ids, subject     # ids of bos, eos, user, ...

    def text(self, s):
        return self.tok.encode(s, add_special_tokens=False).ids

    def said(self, text, question):
        """Ids and weights of what the assistant says."""
        asked, enc = set(nouns(question)), self.tok.encode(text, add_special_tokens=False)
        spans = [m.span() for m in re.finditer(r"[A-Za-z]+", text) if NOUNS.get(m[0].lower()) in asked]
        on = lambda a, b: any(a < y and b > x for x, y in spans)
        return enc.ids, [self.subject if on(a, b) else 1.0 for a, b in enc.offsets]

    def one(self, turns=None, opening=0):
        """opening: one turn, of whose reply only so many tokens are there, among them the subject, and no end."""
        thinks = self.talks.rng.random() < self.talks.think
        while True:
            ids, weights = [self.id["bos"]], [0.0]

            def put(more, w=1.0):
                ids.extend(more)
                weights.extend(w if isinstance(w, list) else [w] * len(more))
            talk = self.talks.conversation(1 if opening else turns or self.talks.turns())
            for q, thought, reply in talk:
                put([self.id["user"]] + self.text(q) + [self.id["assistant"]], 0.0)
                if thought:
                    put([self.id["think"]] + self.text("\n"))
                    said, w = self.said(thought + "\n", q)
                    if opening:
                        put(said[:opening + 3], w[:opening + 3])
                        break
                    put(said, w)
                    put([self.id["end_think"]])
                    reply = "\n\n" + reply
                said, w = self.said(reply, q)
                if opening:
                    put(said[:opening], w[:opening])
                    break
                put(said, w)
                put([self.id["eos"]])
            if not opening or (bool(talk[0][1]) == thinks and max(weights) > 1):
                return ids, weights
