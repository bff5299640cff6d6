"""Words for the titles of the generated catalogue, so that a person can judge a recommendation."""

GENRES: dict[str, tuple[str, ...]] = {
    "Space": ("Planet", "Comet", "Nebula", "Starship", "Orbit", "Moonbase", "Galaxy", "Asteroid"),
    "Crime": ("Detective", "Alibi", "Heist", "Verdict", "Witness", "Forger", "Inspector", "Clue"),
    "Fantasy": ("Dragon", "Wizard", "Castle", "Rune", "Griffin", "Oracle", "Kingdom", "Amulet"),
    "Romance": ("Heart", "Letter", "Wedding", "Waltz", "Promise", "Rose", "Summer", "Sonnet"),
    "Horror": ("Shadow", "Crypt", "Phantom", "Manor", "Raven", "Mirror", "Cellar", "Curse"),
    "Comedy": ("Neighbour", "Butler", "Mix-up", "Landlord", "Parrot", "Cousin", "Waiter", "Prank"),
    "History": ("Emperor", "Legion", "Voyage", "Treaty", "Caravan", "Abbey", "Siege", "Crown"),
    "Nature": ("River", "Forest", "Glacier", "Reef", "Savanna", "Falcon", "Volcano", "Meadow"),
    "Cooking": ("Kitchen", "Baker", "Spice", "Feast", "Noodle", "Orchard", "Chef", "Market"),
    "Sport": ("Marathon", "Regatta", "Striker", "Peloton", "Champion", "Racket", "Relay", "Rider"),
    "Music": ("Violin", "Chorus", "Jukebox", "Melody", "Drummer", "Opera", "Anthem", "Cello"),
    "Travel": ("Harbour", "Railway", "Island", "Compass", "Lantern", "Bazaar", "Canal", "Summit"),
}
ADJECTIVES: tuple[str, ...] = (
    "Silent",
    "Golden",
    "Distant",
    "Hidden",
    "Broken",
    "Crimson",
    "Last",
    "Restless",
    "Northern",
    "Secret",
    "Brave",
    "Velvet",
    "Stolen",
    "Burning",
    "Frozen",
    "Endless",
)
FORMS: tuple[str, ...] = (
    "Saga",
    "Chronicles",
    "Files",
    "Stories",
    "Tales",
    "Diaries",
    "Legends",
    "Nights",
)
