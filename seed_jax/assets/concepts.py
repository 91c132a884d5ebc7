"""Which emoji are one concept: the same thing in another gender, age, direction, size or colour.

The `concept` split of the embedded set holds out whole groups, so that no variant of a test picture
is trained on. Things of one kind, such as a dolphin and a shark, are different concepts. The first
rule that applies names the group:

  1. the subgroups of emojibase that show one drawing with small changes (`SUBGROUPS`);
  2. a shared head word in the label (`HEAD_WORDS`, in order);
  3. the label without its words for gender, age, direction, size and colour (`VARIANT_WORDS`).
"""

import re

# Yellow faces are one drawing with another mouth: emojibase's subgroups face-smiling to
# face-negative. The costumes (ghost, robot, clown) differ, and so do the skulls among the negative.
FACES = (
    "smiling affection tongue hand neutral-skeptical sleepy unwell hat glasses concerned negative"
)

SUBGROUPS = {
    **{f"face-{name}": "face" for name in FACES.split()},
    "alphanum": "button",
    "arrow": "arrow",
    "av-symbol": "button",
    "cat-face": "cat",
    "country-flag": "flag",
    "family": "family",
    "flag": "flag",
    "geometric": "shape",
    "keycap": "keycap",
    "math": "sign of arithmetic",
    "monkey-face": "monkey",
    "person": "person",
    "punctuation": "punctuation",
    "subdivision-flag": "flag",
    "zodiac": "zodiac",
}

# Group, and the words of which one in the label decides. Matched whole, on the lower-case label.
HEAD_WORDS = {
    "skull": "skull|crossbones",
    "playing card": "(spade|heart|diamond|club) suit|joker|playing cards|mahjong",
    "family": "family|people hugging",
    "heart": "hearts?|love letter",
    "wheelchair": "wheelchair",
    "white cane": "white cane",
    "cyclist": "biking|bicycles?",
    "boat": "sailboat|speedboat|motor boat",
    "motherhood": "feeding|breast-feeding|pregnant",
    "claus": "claus",
    "merperson": "merperson|merman|mermaid",
    "dancing": "dancer|dancing",
    "wedding clothes": "tuxedo|veil",
    "headscarf": "turban|headscarf|skullcap",
    "bust": "busts?",
    "prints": "footprints|paw prints|foot",
    "prohibited": "no [a-z]+|prohibited|non-potable water|potable water",
    "gender": "female sign|male sign|transgender symbol",
    "clock": "o’clock|[a-z]+-thirty|clock|watch|stopwatch",
    "hourglass": "hourglass",
    "moon": "moon",
    "sun and cloud": "sun|cloud",
    "star": "star|sparkles?|eight-pointed star|dotted six-pointed star|eight-spoked asterisk",
    "umbrella": "umbrella",
    "snowman": "snowman",
    "globe": "globe",
    "police": "police",
    "taxi": "taxi",
    "bus": "bus|trolleybus|minibus",
    "car": "automobile|sport utility vehicle",
    "truck": "truck|lorry",
    "motorcycle": "motorcycle|scooter",
    "train": "train|railway|locomotive|metro|light rail|tram|monorail|station",
    "cable car": "tramway|cableway",
    "mountain": "mountain|mount fuji",
    "airplane": "airplane",
    "satellite": "satellite",
    "post office": "post office",
    "hotel": "hotel",
    "castle": "castle",
    "tree": "tree|pine decoration",
    "clover": "clover|shamrock",
    "flower": "blossom|flower|hibiscus|rose|tulip",
    "nest": "nest",
    "mushroom": "mushroom",
    "apple": "apple",
    "pepper": "pepper",
    "potato": "potato",
    "egg": "egg",
    "rice": "rice",
    "whale": "whale|orca",
    "shrimp": "shrimp",
    "squid": "squid|octopus",
    "ice cream": "ice cream|shaved ice",
    "beer": "beer",
    "baby bottle": "bottle",
    "magnifying glass": "magnifying glass",
    "eyewear": "glasses|sunglasses|goggles",
    "dog": "(?<!hot )dog|poodle",
    "cat": "cat",
    "monkey": "monkey",
    "horse": "horse",
    "pig": "pig|boar",
    "rabbit": "rabbit",
    "bear": "bear",
    "chick": "chick|chicken",
    "dragon": "dragon",
    "dinosaur": "sauropod|t-rex",
    "spider": "spider",
    "speech balloon": "speech balloon|speech bubble|anger bubble|thought balloon",
    "pointing hand": "index pointing [a-z ]+|index pointing",
    "thumbs": "thumbs",
    "fist": "fist",
    "open hand": (
        "raised hand|raised back of hand|waving hand|fingers splayed|vulcan salute|palms? [a-z ]+"
        "|rightwards hand|leftwards hand|pushing hand|open hands|raising hands|clapping hands"
    ),
    "arm": "biceps|mechanical arm",
    "leg": "leg",
    "ear": "ear(?! of corn)",
    "eye": "eyes?",
    "mouth": "mouth|lip|tongue",
    "bell": "bell|bellhop bell",
    "speaker": "speaker|loudspeaker|megaphone",
    "bath": "bath|bathtub",
    "microphone": "microphone",
    "phone": "phones?|telephone|pager|fax machine",
    "keyboard": "keyboard",
    "disk": "disk|dvd",
    "battery": "battery",
    "camera": "camera|film projector",
    "book": "book|books|notebook|ledger",
    "bookmark": "bookmark|bookmark tabs",
    "money": "banknote",
    "chart": "chart",
    "mailbox": "mailbox|postbox",
    "envelope": "envelope|e-mail",
    "tray": "tray",
    "lock": "locked|unlocked",
    "folder": "folder",
    "calendar": "calendar",
    "pin": "pushpin",
    "paperclip": "paperclips?",
    "ruler": "ruler",
    "key": "key",
    "chain": "chains?|link",
    "house": "house|houses",
    "ski": "skis|skier",
    "pen": "pen|pencil",
    "royalty": "prince|princess|person with crown",
    "traffic light": "traffic light",
    "medal": "medal",
    "restroom": "men’s room|women’s room|restroom",
    "cake": "cake|cupcake|shortcake",
    "handbag": "handbag|clutch bag|purse",
    "water": "droplets?",
    "musical note": "musical notes?",
    "camel": "camel",
    "hammer": "hammer",
    "sheep": "ram|ewe",
    "skyline": "sunrise|sunset|cityscape",
    "shoe": "shoes?",
    "firework": "fireworks|sparkler",
    "baseball": "baseball|softball",
    "rugby football": "football",
    "ticket": "tickets?",
    "check mark": "check mark|check box|ballot",
    "cross mark": "cross mark",
    "cross": "latin cross|orthodox cross",
    "loop": "loop",
    "dollar": "dollar sign|currency exchange",
    "ribbon": "ribbon",
    "drum": "drum",
    "rights": "copyright|registered|trade mark",
}

VARIANT_WORDS = (
    "man|woman|men|women|person|people|boy|girl|male|female|old|older|young|baby|child"
    "|left|right|up|down|upwards|downwards|leftwards|rightwards|facing|oncoming|departure|arrival"
    "|small|large|medium|big|low|high|open|closed|with|without|face|symbol|button|sign"
    "|red|orange|yellow|green|blue|purple|brown|black|white|grey|gray|pink|golden|light|dark"
)

_HEAD_PATTERNS = {
    name: re.compile(rf"(?<![\w’-])(?:{words})(?![\w’-])") for name, words in HEAD_WORDS.items()
}
# In a costume or with another object they are no longer a plain yellow face.
_NOT_A_FACE = re.compile("skull|exploding head")


def concept_group(label: str, subgroup: str) -> str:
    """Returns the concept's name for an emoji, from its English label and emojibase subgroup."""
    label = label.lower()
    if subgroup in SUBGROUPS and not _NOT_A_FACE.search(label):
        return SUBGROUPS[subgroup]
    for name, pattern in _HEAD_PATTERNS.items():
        if pattern.search(label):
            return name
    words = re.findall(r"[\w’-]+", label)
    return " ".join(word for word in words if not re.fullmatch(VARIANT_WORDS, word)) or label
