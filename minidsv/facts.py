"""What the bundled tiny model knows by heart: small tables of (subject, answer) pairs.

Pure data plus the few lines that turn it into `TABLES`; questions are phrased in
`minidsv.questions`. A table is directed: capital -> country is another table than
country -> capital, since a model has to learn either direction on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Table:
    """One kind of question: `templates` hold one `{}` for the subject of a pair."""

    name: str
    templates: tuple[str, ...]
    pairs: Pairs


def _words(text: str) -> list[str]:
    return text.split()


ELEMENTS = """\
hydrogen H, helium He, lithium Li, beryllium Be, boron B, carbon C, nitrogen N, oxygen O,
fluorine F, neon Ne, sodium Na, magnesium Mg, aluminium Al, silicon Si, phosphorus P, sulfur S,
chlorine Cl, argon Ar, potassium K, calcium Ca, scandium Sc, titanium Ti, vanadium V, chromium Cr,
manganese Mn, iron Fe, cobalt Co, nickel Ni, copper Cu, zinc Zn, gallium Ga, germanium Ge,
arsenic As, selenium Se, bromine Br, krypton Kr, rubidium Rb, strontium Sr, yttrium Y,
zirconium Zr, niobium Nb, molybdenum Mo, technetium Tc, ruthenium Ru, rhodium Rh, palladium Pd,
silver Ag, cadmium Cd, indium In, tin Sn, antimony Sb, tellurium Te, iodine I, xenon Xe,
caesium Cs, barium Ba, lanthanum La, cerium Ce, praseodymium Pr, neodymium Nd, promethium Pm,
samarium Sm, europium Eu, gadolinium Gd, terbium Tb, dysprosium Dy, holmium Ho, erbium Er,
thulium Tm, ytterbium Yb, lutetium Lu, hafnium Hf, tantalum Ta, tungsten W, rhenium Re, osmium Os,
iridium Ir, platinum Pt, gold Au, mercury Hg, thallium Tl, lead Pb, bismuth Bi, polonium Po,
astatine At, radon Rn, francium Fr, radium Ra, actinium Ac, thorium Th, protactinium Pa, uranium U,
neptunium Np, plutonium Pu, americium Am, curium Cm, berkelium Bk, californium Cf, einsteinium Es,
fermium Fm, mendelevium Md, nobelium No, lawrencium Lr, rutherfordium Rf, dubnium Db,
seaborgium Sg, bohrium Bh, hassium Hs, meitnerium Mt, darmstadtium Ds, roentgenium Rg,
copernicium Cn, nihonium Nh, flerovium Fl, moscovium Mc, livermorium Lv, tennessine Ts,
oganesson Og"""

CAPITALS = """\
France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna,
Belgium Brussels, Denmark Copenhagen, Sweden Stockholm, Norway Oslo, Finland Helsinki,
Iceland Reykjavik, Ireland Dublin, Greece Athens, Poland Warsaw, Hungary Budapest,
Romania Bucharest, Bulgaria Sofia, Croatia Zagreb, Slovenia Ljubljana, Slovakia Bratislava,
Serbia Belgrade, Albania Tirana, Ukraine Kyiv, Belarus Minsk, Estonia Tallinn, Latvia Riga,
Lithuania Vilnius, Russia Moscow, Turkey Ankara, Cyprus Nicosia, Malta Valletta, Egypt Cairo,
Morocco Rabat, Algeria Algiers, Tunisia Tunis, Libya Tripoli, Kenya Nairobi, Ethiopia Addis_Ababa,
Nigeria Abuja, Ghana Accra, Senegal Dakar, Uganda Kampala, Rwanda Kigali, Angola Luanda,
Namibia Windhoek, Zambia Lusaka, Zimbabwe Harare, Japan Tokyo, China Beijing, India New_Delhi,
Nepal Kathmandu, Pakistan Islamabad, Bangladesh Dhaka, Thailand Bangkok, Vietnam Hanoi,
Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Jordan Amman, Lebanon Beirut, Syria Damascus,
Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Argentina Buenos_Aires, Australia Canberra"""

STATES = """\
Texas Austin, California Sacramento, Ohio Columbus, Georgia Atlanta, Colorado Denver,
Arizona Phoenix, Massachusetts Boston, Tennessee Nashville, Hawaii Honolulu, Alaska Juneau,
Oregon Salem, Nevada Carson_City, Utah Salt_Lake_City, Idaho Boise, Montana Helena,
Wyoming Cheyenne, Kansas Topeka, Nebraska Lincoln, Iowa Des_Moines, Illinois Springfield,
Indiana Indianapolis, Michigan Lansing, Wisconsin Madison, Minnesota Saint_Paul,
Alabama Montgomery, Florida Tallahassee, Virginia Richmond, Maryland Annapolis, Delaware Dover,
Vermont Montpelier, Maine Augusta, Louisiana Baton_Rouge"""

CURRENCIES = """\
Japan yen, China yuan, India rupee, Russia ruble, Mexico peso, Brazil real, Poland zloty,
Sweden krona, Hungary forint, Thailand baht, Turkey lira, Vietnam dong, Nigeria naira, Ghana cedi,
Kenya shilling, Israel shekel, Switzerland franc, France euro, Canada dollar, Egypt pound,
Ukraine hryvnia, Angola kwanza"""

YOUNG = """\
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen chick,
duck duckling, goose gosling, lion cub, deer fawn, frog tadpole, kangaroo joey, swan cygnet,
eagle eaglet, owl owlet, hare leveret"""

OPPOSITES = """\
hot cold, big small, fast slow, high low, up down, left right, day night, open closed, full empty,
light dark, hard soft, early late, old young, rich poor, strong weak, wet dry, thick thin,
loud quiet, sweet sour, true false, near far, first last, black white, happy sad, start end,
push pull"""

POLYGONS = """\
triangle 3, square 4, pentagon 5, hexagon 6, heptagon 7, octagon 8, nonagon 9, decagon 10"""

NATO = _words(
    """\
Alfa Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliett Kilo Lima Mike November Oscar
Papa Quebec Romeo Sierra Tango Uniform Victor Whiskey Xray Yankee Zulu"""
)
GREEK = _words(
    """\
alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma
tau upsilon phi chi psi omega"""
)
MONTHS = _words(
    "January February March April May June July August September October November December"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
PLANETS = _words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune")
ROMAN = _words(
    """\
I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX XXI XXII XXIII XXIV XXV
XXVI XXVII XXVIII XXIX XXX"""
)
ORDINALS = _words("first second third fourth fifth sixth seventh eighth")
NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)


def _pairs(text: str) -> Pairs:
    """`a b, c d` -> ((a, b), (c, d)); an underscore stands for a space inside a name."""
    words = [item.split() for item in text.split(",")]
    return tuple((a.replace("_", " "), b.replace("_", " ")) for a, b in words)


def _reverse(pairs: Pairs) -> Pairs:
    return tuple((b, a) for a, b in pairs)


def _numbered(names: list[str]) -> Pairs:
    """Names and their place, counted from 1."""
    return tuple((name, str(place)) for place, name in enumerate(names, 1))


def _next(names: list[str]) -> Pairs:
    """Each name and its successor in a cycle."""
    return tuple(zip(names, names[1:] + names[:1], strict=True))


def _period(number: int) -> int:
    """Row of the periodic table of an atomic number."""
    return sum(number > noble for noble in NOBLE_GASES[:-1])


def _group(number: int) -> int | None:
    """Column (1-18) of an atomic number; None for lanthanides and actinides."""
    period = _period(number)
    before, after = NOBLE_GASES[period - 1], NOBLE_GASES[period]
    if number == 1 or number - before <= 2:
        return number - before if number != 2 else 18
    group = 18 - (after - number)
    return group if period < 6 or group >= 4 else None


def _build() -> tuple[Table, ...]:
    symbols, capitals, states = _pairs(ELEMENTS), _pairs(CAPITALS), _pairs(STATES)
    numbers = _numbered([name for name, _ in symbols])
    periods = tuple((name, str(_period(int(n)))) for name, n in numbers)
    groups = tuple((name, str(_group(int(n)))) for name, n in numbers if _group(int(n)))
    letters = tuple((word[0], word) for word in NATO)
    greek, months, roman, young = (
        _numbered(GREEK),
        _numbered(MONTHS),
        _numbered(ROMAN),
        _pairs(YOUNG),
    )
    planets = tuple(zip(PLANETS, ORDINALS, strict=True))
    opposites = _pairs(OPPOSITES)
    return (
        Table(
            "symbol", ("What is the chemical symbol of {}?", "What is the symbol of {}?"), symbols
        ),
        Table("element", ("Which element has the symbol {}?",), _reverse(symbols)),
        Table("number", ("What is the atomic number of {}?",), numbers),
        Table("by_number", ("Which element has the atomic number {}?",), _reverse(numbers)),
        Table("period", ("Which period of the periodic table is {} in?",), periods),
        Table("group", ("Which group of the periodic table is {} in?",), groups),
        Table(
            "capital", ("What is the capital of {}?", "Which city is the capital of {}?"), capitals
        ),
        Table("country", ("Which country has the capital {}?",), _reverse(capitals)),
        Table("state_capital", ("What is the state capital of {}?",), states),
        Table("state", ("Which state has the capital {}?",), _reverse(states)),
        Table("currency", ("What is the currency of {}?",), _pairs(CURRENCIES)),
        Table("nato", ("What is the NATO code word for {}?",), letters),
        Table(
            "nato_letter",
            ("Which letter does the NATO code word {} stand for?",),
            _reverse(letters),
        ),
        Table("greek_place", ("Which place in the Greek alphabet has {}?",), greek),
        Table("greek", ("What is letter number {} of the Greek alphabet?",), _reverse(greek)),
        Table("month_number", ("Which number in the year has the month {}?",), months),
        Table("month", ("What is month number {} of the year?",), _reverse(months)),
        Table("next_month", ("Which month comes after {}?",), _next(MONTHS)),
        Table("next_day", ("Which day comes after {}?",), _next(DAYS)),
        Table("previous_day", ("Which day comes before {}?",), _reverse(_next(DAYS))),
        Table("planet", ("Which is the {} planet from the sun?",), _reverse(planets)),
        Table("planet_place", ("Which place from the sun has the planet {}?",), planets),
        Table("roman", ("What is the Roman numeral for {}?",), _reverse(roman)),
        Table("from_roman", ("Which number is the Roman numeral {}?",), roman),
        Table("young", ("What is a young {} called?",), young),
        Table("adult", ("Which animal is a {} the young of?",), _reverse(young)),
        Table("opposite", ("What is the opposite of {}?",), opposites + _reverse(opposites)),
        Table("polygon", ("How many sides has a {}?",), _pairs(POLYGONS)),
    )


TABLES = _build()

NAMES = _words(
    """\
Anna Ben Cara Dan Emma Finn Gina Hugo Ida Jack Kate Leo Mia Nora Omar Paul Quinn Rosa Sam Tina
Una Vera Will Xena Yara Zoe Adam Beth Carl Dora Eric Faye Glen Hope Ivan Jane Karl Lena Mark
Nina Otto Pia Ralf Sara Tom Ugo Viv Walt Ada Bob Clara Dean Elsa Fred Greta Hans Iris Joel Kim
Lara Max Nick Olga Pete Rita Sven Theo Ursa Vito Wanda Abel Bella Chad Dina Ezra Flora Gus
Heidi Igor June Kurt Lucy Milo Nell Oscar Paula Ruth Seth Tess Ulf Vic Wes Alma Bruno Cleo Dirk
Edda Fritz Gwen Hal Inga Jonas Kira Luis Mona Noah Opal Petra Ross Sofie Tim Uli Vince Willa
Amos Bea Cora Dave Ella Felix Gary Hilda Ilse John Klara Lars Maya Ned"""
)

OBJECTS = _words(
    """\
amber anchor apple arrow axe bag ball banana basket bead bell belt bench bike blanket boat bone
book boot bottle bowl box bread brick broom brush bucket button cable cake camera candle cap
card carpet cart chain chair chalk cherry clock cloth coat coin comb cord cork cotton crate
crown cup curtain desk dice dish doll drum engine fan feather fence flag flute fork frame gem
glass globe glove glue grape guitar hammer harp hat helmet honey hook horn jacket jar jewel jug
kettle key kite knife ladder lamp lemon letter lock magnet map mask medal melon mirror mug nail
needle nest net oar olive onion orange oven paint pan paper peach pear pen pencil pepper phone
piano pillow pin pipe plate plum pot purse quilt radio rake ribbon ring rope ruler"""
)

PLACES = _words(
    """\
attic barn beach cabin cellar church cinema farm forest garage garden harbor hotel kitchen
library market museum park school tower"""
)
