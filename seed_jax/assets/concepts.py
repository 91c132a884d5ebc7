"""Which emoji are one concept: the same thing in another gender, age, direction, size or colour.

The `concept` split of the embedded set holds out whole groups, so a rule that is too narrow leaks
a test picture into training, and one that is too wide only makes a group bigger. Rules therefore
lean to the wide side. The first rule that applies names the group:

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
    "boat": "boat|sailboat|speedboat|ship|ferry|canoe",
    "motherhood": "feeding|breast-feeding|pregnant",
    "claus": "claus",
    "royalty": "prince|princess|person with crown",
    "merperson": "merperson|merman|mermaid",
    "dancing": "dancer|dancing",
    "wedding clothes": "tuxedo|veil",
    "headscarf": "turban|headscarf|skullcap",
    "hero": "superhero|supervillain",
    "ski": "skis|skier|snowboarder|sled",
    "bust": "busts?",
    "prints": "footprints|paw prints|foot",
    "prohibited": "no [a-z]+|prohibited|non-potable water|potable water",
    "restroom": "men’s room|women’s room|restroom|baby symbol|water closet",
    "gender": "female sign|male sign|transgender symbol",
    "medal": "medal",
    "clock": "o’clock|[a-z]+-thirty|clock|watch|stopwatch",
    "hourglass": "hourglass",
    "moon": "moon",
    "sun and cloud": "sun|cloud|fog|wind face",
    "skyline": "sunrise|sunset|cityscape|bridge at night|night with stars|foggy|milky way",
    "star": "star|sparkles?|eight-pointed star|dotted six-pointed star|eight-spoked asterisk",
    "umbrella": "umbrella",
    "snowman": "snowman",
    "water": "droplets?|drop of blood",
    "globe": "globe",
    "map": "map",
    "police": "police",
    "taxi": "taxi",
    "bus": "bus|trolleybus|minibus",
    "car": "automobile|sport utility vehicle|racing car|auto rickshaw",
    "truck": "truck|lorry|fire engine|ambulance",
    "motorcycle": "motorcycle|scooter",
    "train": "train|railway|locomotive|metro|light rail|tram|monorail|station",
    "cable car": "tramway|cableway",
    "mountain": "mountain|mount fuji|volcano",
    "airplane": "airplane",
    "satellite": "satellite",
    "traffic light": "traffic light",
    "desert": "desert|beach",
    "house": "house|houses|hut",
    "post office": "post office",
    "hotel": "hotel",
    "castle": "castle",
    "office block": "office building|department store|bank|hospital|convenience store|school",
    "tree": "tree|pine decoration",
    "leaf": "leaf|clover|shamrock|herb|seedling|potted plant",
    "flower": "blossom|flower|hibiscus|rose|rosette|tulip|lotus(?! position)|hyacinth|bouquet",
    "nest": "nest",
    "mushroom": "mushroom",
    "apple": "apple",
    "citrus": "lemon|lime|tangerine",
    "melon": "melon|watermelon",
    "pepper": "pepper",
    "potato": "potato",
    "root vegetable": "ginger root|root vegetable|onion|garlic",
    "bread": "bread|flatbread",
    "sandwich": "hot dog|sandwich|taco|burrito|hamburger",
    "meat": "meat|poultry leg",
    "egg": "egg|cooking",
    "rice": "rice",
    "bowl": "bowl|pan of food|pot of food|salad|fondue|oden",
    "fish": "fish|blowfish|fish cake|shark|dolphin|whale|orca|seal",
    "shrimp": "shrimp|lobster",
    "squid": "squid|octopus",
    "cake": "cake|cupcake|shortcake|pie|custard",
    "ice cream": "ice cream|shaved ice",
    "beer": "beer",
    "baby bottle": "bottle",
    "magnifying glass": "magnifying glass",
    "drinking glass": "glass|clinking glasses|tropical drink|pouring liquid",
    "cup": "teapot|teacup|hot beverage|cup|bubble tea|beverage box|sake",
    "eyewear": "glasses|sunglasses|goggles",
    "cutlery": "fork|spoon|chopsticks",
    "blade": "knife|dagger|swords|axe",
    "dog": "dog|poodle",
    "cat": "cat",
    "big cat": "lion|tiger|leopard",
    "monkey": "monkey|gorilla|orangutan",
    "horse": "horse|unicorn|donkey|zebra",
    "cattle": "cow|ox|buffalo|bison",
    "deer": "deer|moose",
    "pig": "pig|boar",
    "sheep": "ram|ewe|goat",
    "camel": "camel|llama",
    "elephant": "elephant|mammoth",
    "mouse": "mouse|rat|hamster",
    "rabbit": "rabbit|bunny",
    "bear": "bear|panda|koala",
    "raccoon": "raccoon|badger|skunk",
    "chick": "chick|chicken|rooster",
    "bird": "bird|dove|eagle|phoenix",
    "waterfowl": "duck|swan|goose",
    "dragon": "dragon",
    "dinosaur": "sauropod|t-rex",
    "spider": "spider",
    "stick sport": "hockey|lacrosse|cricket game",
    "beetle": "beetle|bug|cockroach|cricket",
    "speech balloon": "speech balloon|speech bubble|anger bubble|thought balloon",
    "pointing hand": "index pointing [a-z ]+|index pointing",
    "thumbs": "thumbs",
    "fist": "fist",
    "open hand": (
        "raised hand|raised back of hand|waving hand|fingers splayed|vulcan salute|palms? [a-z ]+"
        "|rightwards hand|leftwards hand|pushing hand|open hands|raising hands|clapping hands"
    ),
    "finger sign": "pinched fingers|pinching hand|sign of the horns|love-you gesture|call me hand",
    "arm": "biceps|mechanical arm",
    "leg": "leg",
    "ear": "ear(?! of corn)",
    "eye": "eyes?",
    "mouth": "mouth|lip|tongue|kiss mark|lipstick",
    "bell": "bell|bellhop bell",
    "speaker": "speaker|loudspeaker|megaphone",
    "bath": "bath|bathtub",
    "music": "musical notes?|musical score",
    "microphone": "microphone",
    "phone": "phones?|telephone|pager|fax machine",
    "keyboard": "keyboard",
    "disk": "disk|dvd",
    "computer": "computer|laptop",
    "battery": "battery",
    "camera": "camera|film projector",
    "book": "book|books|notebook|ledger",
    "page": "page|scroll|memo|newspaper|receipt|spiral notepad",
    "bookmark": "bookmark|bookmark tabs",
    "money": "banknote|money",
    "chart": "chart",
    "mailbox": "mailbox|postbox",
    "envelope": "envelope|e-mail",
    "tray": "tray",
    "lock": "locked|unlocked",
    "pen": "pen|pencil|nib|crayon|paintbrush",
    "folder": "folder",
    "calendar": "calendar",
    "index card": "card index|card file box|file cabinet",
    "pin": "pushpin",
    "paperclip": "paperclips?",
    "ruler": "ruler",
    "key": "key",
    "hammer": "hammer|wrench|(?<!hair )pick",
    "chain": "chains?|link",
    "baseball": "baseball|softball",
    "rugby football": "football",
    "footwear": "shoes?|sandal|boot|skate",
    "headwear": "hat|cap|helmet",
    "bag": "bags?|handbag|purse|backpack|briefcase|luggage|baggage|customs|passport control",
    "top": "shirt|t-shirt|coat|vest|clothes|dress|sari|kimono|martial arts uniform",
    "underwear": "swimsuit|bikini|briefs|shorts",
    "ticket": "tickets?",
    "check mark": "check mark|check box|ballot",
    "cross mark": "cross mark",
    "cross": "latin cross|orthodox cross",
    "loop": "loop",
    "dollar": "dollar sign|currency exchange",
    "ribbon": "ribbon",
    "drum": "drum",
    "rights": "copyright|registered|trade mark",
    "firework": "fireworks|sparkler|firecracker",
    "place of worship": "church|wedding",
    "construction": "construction",
    "lantern": "lantern|diya lamp|candle",
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
