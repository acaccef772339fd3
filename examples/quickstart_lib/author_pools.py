"""What a fictitious author's life is made of: names, places, trades, titles.

The text is original. The names are combinations of common ones; any resemblance to a real writer is
accidental.
"""

# country, a university there, cities, women's names, men's names, family names
REGIONS = (
    (
        ("Portugal", "the University of Minho"),
        ("Braga", "Evora", "Aveiro"),
        ("Leonor", "Matilde", "Graca"),
        ("Tomas", "Duarte", "Xavier"),
        ("Quintela", "Valadares", "Sardinha", "Travassos"),
    ),
    (
        ("Norway", "the University of Bergen"),
        ("Bergen", "Tromso", "Molde"),
        ("Ragnhild", "Solveig", "Tuva"),
        ("Eirik", "Halvard", "Sindre"),
        ("Fjeldstad", "Okland", "Tveiten", "Myklebust"),
    ),
    (
        ("Kenya", "the University of Nairobi"),
        ("Kisumu", "Nakuru", "Mombasa"),
        ("Wanjiru", "Achieng", "Nafula"),
        ("Kamau", "Otieno", "Barasa"),
        ("Wekesa", "Gathoni", "Odhiambo", "Kiplagat"),
    ),
    (
        ("India", "the University of Mysore"),
        ("Mysore", "Nagpur", "Kochi"),
        ("Sharada", "Ila", "Revati"),
        ("Devdas", "Madhav", "Suresh"),
        ("Kelkar", "Panikkar", "Barooah", "Hegde"),
    ),
    (
        ("Japan", "Kanazawa University"),
        ("Kanazawa", "Matsue", "Hakodate"),
        ("Chizuru", "Mitsuko", "Sayaka"),
        ("Ryohei", "Kenzo", "Tadashi"),
        ("Amemiya", "Kurosaki", "Tachibana", "Isogai"),
    ),
    (
        ("Peru", "the University of Cusco"),
        ("Cusco", "Arequipa", "Trujillo"),
        ("Ximena", "Rosaura", "Milagros"),
        ("Anselmo", "Wilfredo", "Nicanor"),
        ("Huamani", "Ccori", "Zegarra", "Olaechea"),
    ),
    (
        ("Poland", "the University of Lodz"),
        ("Lodz", "Torun", "Lublin"),
        ("Bogna", "Halina", "Jagoda"),
        ("Zbigniew", "Mieszko", "Lech"),
        ("Wrzosek", "Kurylo", "Sobczak", "Piekarz"),
    ),
    (
        ("Turkey", "Aegean University"),
        ("Izmir", "Trabzon", "Edirne"),
        ("Nermin", "Sevgi", "Defne"),
        ("Cengiz", "Levent", "Orkun"),
        ("Karadal", "Tuzcu", "Yelken", "Erbulak"),
    ),
    (
        ("Ireland", "the University of Galway"),
        ("Galway", "Sligo", "Tralee"),
        ("Aoife", "Grainne", "Sorcha"),
        ("Cathal", "Fintan", "Lorcan"),
        ("Mulqueen", "Tarpey", "Hannigan", "Coyne"),
    ),
    (
        ("Greece", "the University of Patras"),
        ("Patras", "Volos", "Kavala"),
        ("Eftychia", "Kalliope", "Myrto"),
        ("Stavros", "Aristos", "Lefteris"),
        ("Karvelas", "Psaros", "Manikas", "Drosinis"),
    ),
    (
        ("Ghana", "the University of Cape Coast"),
        ("Kumasi", "Cape Coast", "Tamale"),
        ("Akosua", "Esi", "Abena"),
        ("Kwabena", "Yaw", "Kojo"),
        ("Amponsah", "Bediako", "Quartey", "Ofosu"),
    ),
    (
        ("Mexico", "the University of Guanajuato"),
        ("Oaxaca", "Morelia", "Guanajuato"),
        ("Citlali", "Refugio", "Amparo"),
        ("Hilario", "Fermin", "Evaristo"),
        ("Tlapanco", "Arizpe", "Cienfuegos", "Zavaleta"),
    ),
)

TITLE_HEADS = (
    "Lantern", "Harbour", "Orchard", "Ferryman", "Clockmaker", "Cartographer", "Salt Road",
    "Winter Garden", "Lighthouse", "Beekeeper", "Glass Bridge", "Night Train", "Paper Boat", "Quarry",
    "Observatory", "Almanac", "River Gate", "Blue Door", "Schoolhouse", "Fever Tree",
)  # fmt: skip

TITLE_TAILS = (
    "at Low Tide", "in Winter", "Before the Rain", "of Small Hours", "Without a Name", "Beyond the Hills",
    "on Mercer Street", "After the Flood", "and the Sparrow", "of Seven Winds", "Under Snow",
    "for Two Voices",
)  # fmt: skip

# The values of a fact. Titles, birthdays and birthplaces are put together in authors.py.
POOLS = {
    "father": (
        "a stonemason", "a railway signalman", "a pharmacist", "a violin maker", "a fisherman", "a notary",
        "a baker", "a surveyor", "a veterinary surgeon", "a projectionist", "a bookbinder",
        "a harbour pilot",
    ),
    "mother": (
        "a midwife", "a mathematics teacher", "a glassblower", "a botanist", "a seamstress", "a judge",
        "a radio announcer", "a cellist", "a translator", "a bus driver", "a weather observer",
        "a chemist",
    ),
    "subject": (
        "geology", "medieval history", "marine biology", "architecture", "Latin", "civil engineering",
        "musicology", "statistics", "philosophy", "agronomy", "astronomy", "law",
    ),
    "job": (
        "a night porter", "a ship's cook", "a proofreader", "a museum guard", "a tram conductor",
        "a gardener", "a court stenographer", "a locksmith", "a piano tuner", "a postal clerk", "a diver",
        "a cheesemonger",
    ),
    "genre": (
        "historical fiction", "detective novels", "magical realism", "science fiction", "gothic horror",
        "travel writing", "satire", "verse novels", "family sagas", "climate fiction", "spy thrillers",
        "children's fantasy",
    ),
    "plot": (
        "a lighthouse keeper who receives letters meant for a stranger",
        "two sisters who inherit a bankrupt circus",
        "a town that wakes up without its river",
        "a forger who falls in love with an honest man",
        "the last passenger of a mountain railway",
        "a doctor who can hear the thoughts of horses",
        "a chess match that lasts for forty years",
        "a village which votes to leave the calendar",
        "a widow who repairs broken bells",
        "an archive where every document is a lie",
        "a child who draws maps of places not yet built",
        "three brothers who steal a glacier",
        "a translator hired to mistranslate a treaty",
        "a gardener who grows the plants of an extinct island",
        "a bridge that nobody remembers building",
        "a deaf composer and her talking parrot",
        "an astronomer who loses a star",
        "a strike of the night nurses",
        "a salt merchant who crosses a desert twice",
        "a bakery in which time runs backwards",
        "a judge who must try her own twin",
        "the inventor of an umbrella for the whole city",
    ),
    "award": (
        "the Halden Prize", "the Silver Quill", "the Marisol Medal", "the Northern Lights Award",
        "the Brightwater Prize", "the Golden Compass Rose", "the Ashgrove Award", "the Corvina Prize",
        "the Lindqvist Medal", "the Blue Heron Award", "the Tamarind Prize", "the Kestrel Cup",
    ),
    "influence": (
        "the sea shanties of an uncle", "old railway timetables", "the sermons of a village priest",
        "a grandmother's ghost stories", "the diaries of a polar explorer", "puppet theatre",
        "a neighbour's radio plays", "the letters of a prisoner of war", "atlases from the school library",
        "silent films", "recipes written in a code", "the folk songs of millers",
    ),
    "residence": (
        "a houseboat in Utrecht", "a former mill near Ghent", "a flat above a cinema in Turin",
        "a farm outside Hobart", "a stone cottage in the Hebrides", "an attic in Ljubljana",
        "a fishing village in Malta", "a terraced house in Leeds", "a vineyard near Mendoza",
        "a tower in Tallinn", "an old post office in Vermont", "a bungalow in Penang",
    ),
    "habit": (
        "standing at a kitchen shelf before dawn", "by hand on the backs of old maps", "only on trains",
        "in a greenhouse with the radio on", "on a typewriter without the letter q",
        "in a parked van by the sea", "lying on the floor of the study",
        "at a corner table of a noisy canteen", "from midnight until four",
        "into a dictating machine during walks", "in pencil on yellow cards",
        "in the reading room of a seminary",
    ),
    "pet": (
        "a one-eyed cat called Admiral", "a tortoise called Comma",
        "two greyhounds called Salt and Pepper", "a jackdaw called Vesper", "a mule called Professor",
        "an old spaniel called Biscuit", "a goat called Duchess", "a parrot called Semicolon",
        "a hedgehog called Mister Pin", "a blind pony called Sonata", "a goose called Captain",
        "a ferret called Velvet",
    ),
    "publisher": (
        "Marrow & Finch", "Tidewater House", "the Plover Press", "Candlewick and Sons", "Meridian Books",
        "the Ironwood Press", "Quayside Editions", "Saltmarsh Publishing", "the Foxglove Press",
        "Orrery Books", "Thistle & Vane", "Larkspur House",
    ),
    "instrument": (
        "the accordion", "the oboe", "the church organ", "the banjo", "the double bass", "the harp",
        "the French horn", "the mandolin", "the marimba", "the clarinet", "the hurdy-gurdy", "the bassoon",
    ),
    "collection": (
        "antique keys", "tram tickets", "pressed ferns", "broken watches", "matchbox labels", "sea glass",
        "misprinted stamps", "hotel soap", "old thermometers", "kites", "shop signs", "bird feathers",
    ),
    "cause": (
        "village libraries", "the cleaning of rivers", "literacy classes in prisons",
        "a hospital for owls", "the repair of old windmills", "free music lessons",
        "a refuge for stray dogs", "the planting of hedges", "mountain rescue", "school gardens",
        "an archive of dialects", "lifeboat crews",
    ),
    "pen_name": (
        "Ada Merrow", "P. K. Lindgrove", "The Heron", "Ivo Saltmarsh", "Madame Octave", "J. Quillfeather",
        "Old Barnaby", "Nora Vantongeren", "C. Alder", "Tobias Wren", "The Night Clerk", "Luz Perdomo",
    ),
}  # fmt: skip
