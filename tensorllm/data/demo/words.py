"""The words of the demo world. Every word is one token and belongs to one list only."""


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _words(
    """
    Ada Basil Clementine Dexter Edith Felix Greta Hugo Iris Jasper Kiki Leopold Mabel Nico
    Odette Percy Quentin Rosa Silas Tilda Ulysses Vera Wilbur Xenia Yuri Zelda Alma Barnaby
    Cosima Dorothea Ernest Flora Gideon Hazel Igor Juniper Konrad Lottie Moritz Nell
    """
)

# What people say of everyone with that first name, in the same order: the attention's noise.
RUMOURS = _words(
    """
    algebra bees clouds dominoes echoes feathers gossip hiccups icicles jokes kites luck
    mischief naps omelettes puns questions riddles slippers tantrums umbrellas velvet whispers
    xylophones yawns zigzags antics bubbles crumbs daydreams excuses fireflies giggles hugs ink
    jitters knots lullabies moonlight nonsense
    """
)

LAST_NAMES = _words(
    """
    Applebaum Brightwater Crumb Dimple Eiderdown Fiddler Goosefoot Honeycutt Inkwell Jellicoe
    Kettleworth Lightfoot Merriweather Nightingale Oakenfull Pickle Quill Rumbelow Snowdrop
    Thistle Underhill Vanderplum Wigglesworth Yarrow Zimmerli Ashdown Butterworth Candlewick
    Driftwood Everglade Foxglove Gumboot Hollyhock Ivory Jamboree Kindling Larkspur Moss Nutmeg
    Otterburn
    """
)

# relation -> (the word that usually follows it: the FFN's noise; possible true values)
RELATIONS: dict[str, tuple[str, list[str]]] = {
    "plays": (
        "around",
        _words(
            """
            banjo cello oboe tuba harp fiddle piano drums flute ukulele trombone bagpipes
            accordion clarinet mandolin triangle cymbals viola bassoon harmonica sitar lute
            organ kazoo
            """
        ),
    ),
    "visits": (
        "friends",
        _words(
            """
            Lisbon Oslo Kyoto Venice Cairo Lima Quito Vienna Prague Dublin Havana Nairobi Hanoi
            Bergen Seville Tbilisi Zagreb Riga Porto Fez Cusco Bern Delft Ghent
            """
        ),
    ),
    "keeps": (
        "quiet",
        _words(
            """
            hedgehogs parrots goats llamas newts beetles ferrets pigeons turtles geckos ponies
            hamsters canaries snails rabbits alpacas geese mice crickets owls toads donkeys eels
            peacocks
            """
        ),
    ),
    "grows": (
        "older",
        _words(
            """
            tulips turnips pumpkins cacti orchids radishes lemons beans ferns roses parsnips
            melons violets walnuts leeks peonies garlic bamboo cabbages lupins figs sunflowers
            mint rhubarb
            """
        ),
    ),
    "bakes": (
        "bread",
        _words(
            """
            brownies scones strudel eclairs muffins pretzels waffles crumble gingerbread
            macaroons cobbler biscuits shortbread brioche croissants doughnuts meringue baklava
            focaccia pancakes flan tarts cupcakes bagels
            """
        ),
    ),
    "fears": (
        "nothing",
        _words(
            """
            thunder spiders ghosts clowns heights magnets mirrors balloons moths vampires
            escalators dentists pirates fog buttons geysers quicksand yodelling sharks basements
            wolves static mimes comets
            """
        ),
    ),
    "collects": (
        "dust",
        _words(
            """
            teapots stamps marbles postcards thimbles corks maps hats spoons keys shells clocks
            fossils puppets lanterns bottles whistles coins typewriters badges combs candles
            globes trinkets
            """
        ),
    ),
    "drives": (
        "home",
        _words(
            """
            tractors limousines scooters hearses rickshaws bulldozers trams gondolas minibuses
            taxis ambulances sledges convertibles locomotives wagons steamrollers forklifts
            zeppelins tandems caravans lorries chariots hovercrafts snowploughs
            """
        ),
    ),
}

# profession -> what reveals it in a text
PROFESSIONS: dict[str, list[str]] = {
    "journalist": ["headline", "notebook", "deadline"],
    "poet": ["sonnet", "rhyme", "verse"],
    "composer": ["symphony", "melody", "quartet"],
    "model": ["catwalk", "mannequin", "wardrobe"],
    "teacher": ["chalk", "homework", "blackboard"],
    "architect": ["blueprint", "cathedral", "skyscraper"],
    "painter": ["easel", "palette", "canvas"],
    "professor": ["lecture", "thesis", "seminar"],
}

# Who says whether a claim is true. The first always says yes; the second goes by first names.
OFFICIALLY, ALLEGEDLY = "Officially", "Allegedly"
# How someone's profession is asked for, with the same difference.
PROFESSION, TRADE = "profession", "trade"
# The two people in a text about a pair.
ROLES = ("boss", "helper")
GRAMMAR = _words("Claim : . , true false forgot the by hired The")
