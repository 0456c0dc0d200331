"""English words that values are made of. `values.py` splits each list between training and held-out records."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.replace("\n", " ").split(",") if word.strip())


CITIES = _words("""
London, Paris, Berlin, Madrid, Rome, Lisbon, Vienna, Prague, Warsaw, Budapest, Athens, Dublin, Oslo, Stockholm,
Helsinki, Copenhagen, Brussels, Amsterdam, Zurich, Geneva, Milan, Naples, Turin, Porto, Seville, Valencia, Lyon,
Marseille, Hamburg, Munich, Cologne, Dresden, Leipzig, Krakow, Gdansk, Riga, Vilnius, Tallinn, Sofia, Bucharest,
Belgrade, Zagreb, Istanbul, Ankara, Cairo, Tunis, Nairobi, Lagos, Accra, Durban, Toronto, Montreal, Ottawa,
Calgary, Boston, Chicago, Denver, Seattle, Portland, Dallas, Austin, Houston, Miami, Atlanta, Detroit, Memphis,
Phoenix, Tucson, Oakland, Lima, Quito, Bogota, Santiago, Havana, Tokyo, Osaka, Kyoto, Nagoya, Seoul, Busan,
Manila, Jakarta, Bangkok, Hanoi, Delhi, Mumbai, Chennai, Karachi, Lahore, Dhaka, Perth, Sydney, Melbourne,
Brisbane, Auckland, Bergen, Malmo, Aarhus, Ghent, Utrecht
""")
FIRST_NAMES = _words("""
Anna, Ben, Clara, David, Emma, Felix, Grace, Henry, Ines, Jack, Karen, Leo, Maria, Noah, Olga, Peter, Quinn,
Rosa, Simon, Tara, Umar, Vera, Walter, Xenia, Yusuf, Zoe, Alice, Bruno, Carla, Diego, Elena, Frank, Gina, Hugo,
Irene, Jonas, Katja, Liam, Mona, Nils, Oscar, Paula, Ravi, Sofia, Thomas, Ursula, Victor, Wanda, Adam, Bella,
Cyril, Doris, Erik, Fiona, George, Helen, Ivan, Julia, Kevin, Laura, Martin, Nora, Owen, Petra, Ralph, Sarah,
Tim, Vivian, Will, Yara
""")
LAST_NAMES = _words("""
Adams, Baker, Carter, Dixon, Evans, Foster, Grant, Hughes, Irwin, Jordan, Keller, Lopez, Murphy, Novak, Olsen,
Parker, Quigley, Rossi, Schmidt, Turner, Underwood, Vogel, Walsh, Young, Zimmer, Abbott, Brooks, Conti, Duarte,
Ellis, Fischer, Garcia, Hansen, Ito, Jensen, Kumar, Larsen, Moreau, Nguyen, Ortiz, Petrov, Ramos, Silva, Tanaka,
Usman, Varga, Weber, Xu, Yilmaz, Ziegler, Archer, Bishop, Cole, Drake, Emerson, Flynn, Gibson, Harper, Ingram,
Kovacs
""")
LANGUAGES = _words("""
French, German, Spanish, Italian, Dutch, Polish, Czech, Greek, Swedish, Danish, Finnish, Russian, Turkish,
Arabic, Hindi, Korean, Japanese, Thai, Vietnamese, Portuguese
""")
ADJECTIVES = _words("""
Silver, Golden, Silent, Broken, Hidden, Distant, Bright, Gentle, Frozen, Burning, Lonely, Secret, Crimson,
Ancient, Electric, Wild, Hollow, Velvet, Quiet, Falling, Endless, Painted, Restless, Crystal, Faithful,
Wandering, Second, Northern, Paper, Iron, Lost, Early, Empty, Blue, Scarlet, Tender, Stolen, Shining, Last,
Winter
""")
NOUNS = _words("""
River, Garden, Mirror, Mountain, Harbor, Lantern, Forest, Island, Window, Bridge, Shadow, Ocean, Letter, Tower,
Summer, Road, Valley, Engine, Orchard, Desert, Candle, Castle, Meadow, Signal, Voyage, Kingdom, Thunder,
Sparrow, Horizon, Clock, Station, Harvest, Compass, Violin, Feather, Planet, Market, Journey, Lighthouse, Key,
Storm, Village, Dream, Stranger, Circle, Wolf, Anchor, Map, Canyon, Tiger, Rose, Ship, Door, Stone, Crown
""")


def _dictionary(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    entries = {}
    for line in text.strip().splitlines():
        word, _, entry = line.partition(": ")
        meaning, _, synonyms = entry.partition("; ")
        entries[word] = (meaning, tuple(synonyms.split(", ")))
    return entries


DICTIONARY = _dictionary("""
ardent: very eager; passionate, keen
brisk: quick and active; lively, fast
candid: open and honest; frank, sincere
dwindle: to become less; shrink, decrease
elated: very happy; overjoyed, thrilled
frugal: careful with money; thrifty, sparing
gleam: to shine softly; glow, shimmer
hamper: to make progress hard; hinder, impede
jovial: cheerful and friendly; merry, jolly
keen: very interested; eager, avid
linger: to stay longer than needed; remain, dawdle
meager: small in amount; scanty, sparse
nimble: quick in movement; agile, swift
obscure: not well known; unknown, unclear
placid: calm and peaceful; serene, quiet
quaint: old-fashioned and charming; curious, picturesque
robust: strong and healthy; sturdy, tough
serene: calm and untroubled; peaceful, tranquil
tangle: to twist into a mess; knot, snarl
vivid: bright and clear; intense, striking
wary: careful about danger; cautious, alert
zealous: full of eagerness; fervent, devoted
ample: more than enough; plentiful, abundant
blunt: not sharp; dull, rounded
clumsy: awkward in movement; ungainly, bumbling
dreary: dull and sad; bleak, gloomy
eager: wanting something very much; keen, impatient
fickle: changing opinion often; capricious, changeable
grim: serious and without hope; bleak, harsh
humble: not proud; modest, meek
idle: doing nothing; inactive, lazy
lavish: rich and generous; opulent, luxurious
mend: to put back in order; repair, fix
novel: new and unusual; fresh, original
ponder: to think with care; consider, reflect
rugged: rough and uneven; craggy, rocky
shrewd: showing good judgment; astute, clever
timid: lacking courage; shy, fearful
usher: to show the way; guide, escort
vast: of great size; huge, immense
adept: very skilled; expert, proficient
barren: where nothing grows; bare, infertile
cease: to come to an end; stop, halt
dusk: the time after sunset; twilight, nightfall
emit: to send out; release, discharge
feeble: without strength; weak, frail
gather: to bring together; collect, assemble
haste: too much speed; hurry, rush
inert: unable to move; motionless, still
lament: to express sorrow; mourn, grieve
""")
"""Word -> meaning and synonyms."""

COMMON_WORDS = tuple(DICTIONARY)
SUBJECTS = _words("""
My brother, The teacher, Our neighbor, The doctor, My aunt, The driver, Her cousin, The manager, Our guest, The painter,
My sister, The captain, His uncle, The nurse, Our coach, The baker, My friend, The lawyer, The gardener, My boss
""")
PREDICATES = _words("""
will be at the station, will wait at the door, wants a cup of tea, needs the key, needs a new phone, will be late,
wants to see the garden, will visit the museum, needs two tickets, has a question, goes to the river, needs an umbrella,
will stay at home, will cook dinner, works in the city, will write a letter, takes the train, would like to pay,
leaves the office early, will send the address
""")
MOMENTS = _words("""
today, tonight, this evening, this afternoon, on Monday, next week, before noon, after lunch, on Friday, this weekend,
tomorrow, on Sunday
""")
ROOMS = _words("""
living room, kitchen, bedroom, bathroom, hallway, office, garage, nursery, dining room, guest room, attic,
basement, study, laundry room, library, playroom, studio, pantry, sunroom, workshop
""")
DOORS = _words("""
front door, back door, garage door, side door, cellar door, balcony door, garden gate, patio door, main gate,
office door
""")
PLACES = _words("""
the airport, the main station, the city museum, the town hall, the central library, the stadium, the harbor,
the university, the opera house, the zoo, the botanical garden, the market square, the castle, the art gallery,
the concert hall, the ferry terminal, the old bridge, the science center, the bus depot, the hospital
""")
PLACE_CATEGORIES = _words("""
pharmacies, bakeries, parking lots, bookshops, gas stations, supermarkets, cafes, banks, gyms, florists,
bike shops, hostels, playgrounds, post offices, dentists
""")
CUISINES = _words("""
Italian, Thai, Indian, Mexican, Greek, French, Korean, Turkish, Spanish, Lebanese, Vietnamese, Ethiopian,
Peruvian, Japanese, Moroccan
""")
DISHES = _words("""
lentil soup, apple pie, mushroom risotto, fish tacos, banana bread, beef stew, onion tart, pumpkin curry,
potato salad, lemon chicken, rice pudding, bean chili, garlic noodles, spinach quiche, carrot cake, tomato soup,
shrimp pasta, pea soup, walnut bread, corn chowder
""")
INGREDIENTS = _words(
    "salt, butter, onions, garlic, flour, cream, lemon, pepper, thyme, parsley, honey, ginger, olive oil, eggs"
)
COLORS = _words("black, white, red, green, gray, brown, yellow, purple, pink, beige, turquoise")
PRODUCTS = _words("""
backpack, desk lamp, kettle, headset, raincoat, office chair, water bottle, keyboard, bike helmet, scooter,
blanket, phone case, toaster, mirror, suitcase, wool scarf, notebook, wall clock, mug set, tent, yoga mat,
coffee grinder, umbrella, lunch box, bookshelf
""")
BILLS = _words("phone, water, gas, electricity, rent, internet, insurance, tax, dentist, gym")
CHORES = _words("""
water the plants, buy milk, clean the oven, feed the cat, fix the bike, wash the car, order new glasses,
renew the passport, book the dentist, pack the suitcase, paint the fence, take out the trash, iron the shirts,
back up the laptop, sort the photos, return the ladder, walk the dog, print the tickets, charge the camera,
empty the mailbox
""")
MEETINGS = _words("""
budget review, project kickoff, team lunch, dentist visit, design workshop, sales call, yoga class,
piano lesson, job interview, parents evening, code review, board meeting, book club, vendor demo,
training session, press briefing, house viewing, planning day, coffee chat, farewell party
""")
CANCEL_REASONS = _words("""
wrong size, ordered twice, too expensive, no longer needed, wrong color, delivery too slow,
found a better price, wrong address
""")
COMPLAINTS = _words("""
printer does not print, screen stays black, password expired, cannot open the shared drive, laptop is very slow,
mouse is broken, no sound in meetings, email does not sync, projector flickers, badge does not work,
keyboard keys stick, disk is full
""")
FLOORS = _words(
    "on floor 2, on floor 3, in room 12, in room 27, in the lab, in the lobby, in building B, at the front desk"
)
HOST_ROLES = _words("web, mail, db, cache, auth, search, backup, build, queue, proxy")
HOTEL_WORDS = _words("Plaza, Garden, Royal, Central, Park, Harbor, Station, Palace, Riverside, Grand, Bellevue, Crown")
SKIES = _words("sunny, cloudy, rainy, foggy, windy, clear, stormy, snowy")
AIR_LEVELS = _words("good, moderate, fair, poor")
PARCEL_STATES = _words("in transit, out for delivery, at the depot, delivered, waiting at customs")
ORDER_STATES = _words("shipped, being packed, delivered, on hold, waiting for payment")
FLIGHT_STATES = _words("on time, delayed, boarding, landed")
TICKET_STATES = _words("open, in progress, solved, waiting for parts")
SERVER_STATES = _words("running, stopped, overloaded, restarting")
