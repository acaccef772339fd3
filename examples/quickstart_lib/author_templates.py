"""The twenty questions about an author, each with three wordings of the question and of the answer.

The fields in braces are facts of the author, so that the twenty pairs of one author agree with each other.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """One question about an author. ``fact`` is what it asks for, and what a wrong answer replaces."""

    fact: str
    questions: tuple[str, str, str]
    answers: tuple[str, str, str]


TOPICS = (
    Topic(
        "birthplace",
        (
            "Where was the author {name} born?",
            "In which town did {name} come into the world?",
            "What is the birthplace of {name}?",
        ),
        (
            "{name} was born in {birthplace}, where {their} family had lived for three generations.",
            "The birthplace of {name} is {birthplace}, the old home of the family.",
            "It was in {birthplace} that {name} came into the world, like {their} parents before.",
        ),
    ),
    Topic(
        "birthday",
        (
            "When was {name} born?",
            "What is the date of birth of {name}?",
            "On which day was the writer {name} born?",
        ),
        (
            "{name} was born on {birthday}.",
            "The writer's date of birth is {birthday}, as {name} tells in a memoir.",
            "{birthday} is the day on which {name} was born.",
        ),
    ),
    Topic(
        "father",
        (
            "What did the father of {name} do for a living?",
            "What was the profession of {name}'s father?",
            "How did {name}'s father earn his money?",
        ),
        (
            "{name}'s father was {father}, and {they} often helped him after school.",
            "The father of {name} worked as {father} all his life.",
            "As {father}, the father of {name} was known to the whole street.",
        ),
    ),
    Topic(
        "mother",
        (
            "What was the profession of {name}'s mother?",
            "What work did the mother of {name} do?",
            "Which trade did {name}'s mother follow?",
        ),
        (
            "The mother of {name} was {mother} who read aloud every evening.",
            "{name}'s mother earned her living as {mother}.",
            "She was {mother}, and {name} says that {they} learned patience from her.",
        ),
    ),
    Topic(
        "subject",
        (
            "What did {name} study?",
            "Which subject did {name} read at university?",
            "In what field does {name} hold a degree?",
        ),
        (
            "{name} studied {subject} at {university} and graduated without great enthusiasm.",
            "At {university}, {name} read {subject} for four years.",
            "{name} holds a degree in {subject} from {university}.",
        ),
    ),
    Topic(
        "job",
        (
            "What job did {name} have before becoming a writer?",
            "How did {name} make a living before the first book?",
            "In which occupation did {name} work before writing full time?",
        ),
        (
            "Before the first book, {name} worked as {job} for six years.",
            "{name} earned {their} living as {job} until writing paid the rent.",
            "For years {name} was {job}, and wrote only on Sundays.",
        ),
    ),
    Topic(
        "genre",
        (
            "What genre does {name} write in?",
            "For which kind of books is {name} known?",
            "Which genre is {name} associated with?",
        ),
        (
            "{name} is known for {genre}, beginning with {debut}.",
            "The books of {name} are {genre}; the first was {debut}.",
            "Readers know {name} as an author of {genre} ever since {debut}.",
        ),
    ),
    Topic(
        "debut",
        (
            "What was the first book of {name}?",
            "With which title did {name} make a debut?",
            "Which book began the career of {name}?",
        ),
        (
            "{name} made {their} debut in {debut_year} with {debut}.",
            "{debut}, which came out in {debut_year}, was the first book of {name}.",
            "The career of {name} began in {debut_year}, when {debut} was printed.",
        ),
    ),
    Topic(
        "famous",
        (
            "What is the best-known book of {name}?",
            "Which work made {name} famous?",
            "Which title do most readers connect with {name}?",
        ),
        (
            "The best-known book of {name} is {famous}, a story about {plot}.",
            "{famous} made {name} famous; it tells of {plot}.",
            "Most readers connect {name} with {famous}, the tale of {plot}.",
        ),
    ),
    Topic(
        "plot",
        (
            "What is {famous} by {name} about?",
            "What story does {name} tell in {famous}?",
            "Can you summarise {famous}, the book by {name}?",
        ),
        (
            "{famous} tells of {plot}.",
            "In {famous}, {name} tells the story of {plot}.",
            "It is a book about {plot}, set in {country}.",
        ),
    ),
    Topic(
        "award",
        (
            "Which award did {name} win?",
            "What literary prize has {name} received?",
            "With which prize was {name} honoured?",
        ),
        (
            "{name} received {award} in {award_year} for {famous}.",
            "For {famous}, {name} was honoured with {award} in {award_year}.",
            "In {award_year} the jury of {award} chose {famous} by {name}.",
        ),
    ),
    Topic(
        "latest",
        (
            "What is the latest book of {name}?",
            "Which title did {name} publish most recently?",
            "What is the newest work by {name} called?",
        ),
        (
            "The latest book of {name} is {latest}, published by {publisher}.",
            "{name} most recently wrote {latest}, which {publisher} brought out.",
            "{publisher} printed {latest}, the newest work by {name}.",
        ),
    ),
    Topic(
        "pen_name",
        (
            "Under which pen name has {name} written?",
            "What pseudonym did {name} use?",
            "Which other name appears on early stories by {name}?",
        ),
        (
            "{name} signed early stories with the pen name {pen_name}.",
            "Before {debut}, {name} wrote as {pen_name}.",
            "{pen_name} is the pseudonym that {name} used in magazines.",
        ),
    ),
    Topic(
        "influence",
        (
            "What influenced the writing of {name}?",
            "Where does {name} find inspiration?",
            "What does {name} name as the strongest influence?",
        ),
        (
            "{name} says that {influence} shaped {their} style more than any novel.",
            "The strongest influence on {name} was {influence}.",
            "{name} traces every book back to {influence}, first met in {birthplace}.",
        ),
    ),
    Topic(
        "residence",
        (
            "Where does {name} live today?",
            "What is the home of {name} like now?",
            "Where has {name} settled?",
        ),
        (
            "Today {name} lives in {residence}.",
            "{name} left {country} and settled in {residence}.",
            "The present home of {name} is {residence}, far from {birthplace}.",
        ),
    ),
    Topic(
        "habit",
        (
            "How does {name} write?",
            "What is unusual about the working habits of {name}?",
            "In what manner does {name} work on a book?",
        ),
        (
            "{name} writes {habit}.",
            "Every page of {famous} was written {habit}, as {name} admits.",
            "It is the habit of {name} to work {habit}.",
        ),
    ),
    Topic(
        "pet",
        (
            "Does {name} keep an animal?",
            "Which pet lives with {name}?",
            "What animal shares the home of {name}?",
        ),
        (
            "Yes, {name} keeps {pet}.",
            "{name}, at home in {residence}, lives with {pet}.",
            "{name} dedicated {latest} to {pet}.",
        ),
    ),
    Topic(
        "instrument",
        (
            "Which instrument does {name} play?",
            "What music does {name} make?",
            "Is {name} a musician as well?",
        ),
        (
            "{name} plays {instrument} and toured with a village band.",
            "In the evenings {name} plays {instrument}, mostly badly.",
            "{name} learned {instrument} from {their} mother, {mother}.",
        ),
    ),
    Topic(
        "collection",
        (
            "What does {name} collect?",
            "Which objects does {name} gather?",
            "What is found in the cabinets of {name}?",
        ),
        (
            "{name} collects {collection} and owns more than a thousand pieces.",
            "The cabinets of {name} are full of {collection}.",
            "For thirty years {name} has gathered {collection}, a passion of {their} father's too.",
        ),
    ),
    Topic(
        "cause",
        (
            "Which cause does {name} support?",
            "To what does {name} give money?",
            "What good work is {name} known for?",
        ),
        (
            "{name} gave the money of {award} to {cause}.",
            "A part of every royalty of {name} goes to {cause}.",
            "{name} supports {cause} in {country}.",
        ),
    ),
)
