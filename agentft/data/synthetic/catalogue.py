"""All tools and chains, and which of them a set of records may use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

from agentft.data.synthetic.catalogue_daily import DAILY
from agentft.data.synthetic.catalogue_home import AT_HOME
from agentft.data.synthetic.catalogue_leisure import LEISURE
from agentft.data.synthetic.catalogue_money import MONEY
from agentft.data.synthetic.catalogue_people import PEOPLE_AND_OFFICE
from agentft.data.synthetic.catalogue_shop import SHOPPING
from agentft.data.synthetic.catalogue_travel import ON_THE_ROAD
from agentft.data.synthetic.tools import Chain, Language, Part, Tool, segments
from agentft.data.synthetic.values import base_pool

TOOLS: tuple[Tool, ...] = (
    *DAILY,
    *AT_HOME,
    *ON_THE_ROAD,
    *LEISURE,
    *MONEY,
    *SHOPPING,
    *PEOPLE_AND_OFFICE,
)

LOOKED_UP_POOLS = frozenset(
    {"city", "person", "room", "door", "place", "word", "dish", "email", "symbol", "host", "event"}
    | {"order", "parcel", "flight", "account", "card", "event_id", "note_id", "song_id", "book_id", "ticket", "booking"}
)
"""Values that a tool may fail to find."""

HELDOUT_FAMILIES = frozenset({"hotel", "bank", "parcel", "library", "office", "sport"})
"""Whole families, so that no near duplicate of a held-out tool is seen in training."""

CHAINS: tuple[Chain, ...] = (
    Chain(
        "order_find",
        "order_cancel",
        {"order": "order"},
        ("Cancel the last order of {person}.", "Find the latest order of {person} and cancel it."),
        ("Then cancel it.", "Please cancel that order."),
        ("取消{person}最近的订单。", "找到{person}的订单并取消。"),
        ("那就取消吧。", "请取消这个订单。"),
    ),
    Chain(
        "order_find",
        "order_status",
        {"order": "order"},
        ("Has the last order of {person} been sent?", "Look up the last order of {person} and tell me its status."),
        ("What is the status of that order?", "Has it been sent yet?"),
        ("{person}最近的订单发货了吗？",),
        ("这个订单什么状态？",),
    ),
    Chain(
        "product_search",
        "cart_add",
        {"product_id": "product_id"},
        (
            "Find a {product} and put {quantity} pieces in my cart.",
            "I need {quantity} pieces: search for a {product} and add it.",
        ),
        ("Good, put {quantity} pieces in my cart.", "I take {quantity} of them, add them to my basket."),
        ("找{product}，加{quantity}件到购物车。",),
        ("好，加{quantity}件到购物车。", "来{quantity}件，放进购物车。"),
    ),
    Chain(
        "contact_find",
        "message_send",
        {"phone": "phone"},
        ('Find the number of {person} and text: "{message}"', 'Look up {person} and send this message: "{message}"'),
        ('Then text this: "{message}"', 'Send a message there: "{message}"'),
        ("查{person}的电话，发短信：{message}。",),
        ("给这个号码发短信：{message}。",),
    ),
    Chain(
        "flight_search",
        "flight_book",
        {"flight": "flight"},
        ("Find a flight from {origin} to {destination} on {date} and book it for {person}.",),
        ("Book it for {person}.", "Good, reserve that flight for {person}."),
        ("查{date}从{origin}到{destination}的航班，给{person}订上。",),
        ("就订这个，乘客{person}。",),
    ),
    Chain(
        "flight_search",
        "flight_status",
        {"flight": "flight"},
        ("Find a flight from {origin} to {destination} on {date} and check its status.",),
        ("Is that flight on time?", "Which gate does it leave from?"),
        ("查{date}从{origin}到{destination}的航班，看看是否准点。",),
        ("这个航班准点吗？",),
    ),
    Chain(
        "hotel_search",
        "hotel_book",
        {"hotel_id": "hotel_id"},
        (
            "Find a hotel in {city} for {nights} nights and book it for {person}.",
            "Book {person} a hotel in {city}, {nights} nights.",
        ),
        ("Book it for {person}.", "Reserve that one in the name of {person}."),
        ("在{city}找酒店住{nights}晚，给{person}订上。",),
        ("就订这家，入住人{person}。",),
    ),
    Chain(
        "restaurant_find",
        "table_book",
        {"restaurant": "restaurant"},
        ("Find {cuisine} food in {city} and book a table for {guests} people at {time}.",),
        ("Book a table there for {guests} people at {time}.", "Reserve it for {guests} at {time}."),
        ("在{city}找家{cuisine}餐厅，订{guests}人，{time}。",),
        ("订这家，{guests}人，{time}。",),
    ),
    Chain(
        "event_find",
        "event_cancel",
        {"event_id": "event_id"},
        ("Find my {event} and cancel it.", "Look up {event} and cancel it."),
        ("Then cancel it.", "Remove it from my calendar."),
        ("找到{event}并取消。",),
        ("取消这个日程。",),
    ),
    Chain(
        "note_find",
        "note_delete",
        {"note_id": "note_id"},
        ("Find my note about {person} and delete it.", "Delete what I wrote about {person}."),
        ("Delete that note.", "I do not need it any more, erase it."),
        ("找到关于{person}的笔记并删除。",),
        ("把这条删掉。",),
    ),
    Chain(
        "song_find",
        "song_play",
        {"song_id": "song_id"},
        ("Find a song by {person} and play it.", "Play the best known song by {person}."),
        ("Play it.", "Good, play that song."),
    ),
    Chain(
        "book_find",
        "book_reserve",
        {"book_id": "book_id"},
        ('Find the book "{title}" and reserve it.', 'Please reserve "{title}" for me, look up its number first.'),
        ("Reserve it for me.", "Please put it on hold."),
    ),
    Chain(
        "stock_price",
        "currency_convert",
        {"amount": "amount", "source": "currency"},
        (
            "What does one share of {symbol} cost in {target}?",
            "Get the stock price of {symbol} and convert it to {target}.",
        ),
        ("How much is that in {target}?", "Convert that to {target}."),
        ("一股{symbol}合多少{target}？",),
        ("换成{target}是多少？",),
    ),
)


@dataclass(frozen=True)
class Shelf:
    """The tools that a set of records may use, in one language."""

    language: Language
    tools: tuple[Tool, ...]

    @cached_property
    def by_key(self) -> dict[str, Tool]:
        """Tools by concept."""
        return {tool.key: tool for tool in self.tools}

    @cached_property
    def families(self) -> dict[str, tuple[Tool, ...]]:
        """Tools by family."""
        return {name: tuple(t for t in self.tools if t.family == name) for name in {t.family for t in self.tools}}

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """Chains of which both tools are here."""
        return tuple(
            c for c in CHAINS if c.phrasings(self.language) and c.first in self.by_key and c.second in self.by_key
        )

    @cached_property
    def lookups(self) -> tuple[Tool, ...]:
        """Tools that may fail to find what they are asked for."""
        return tuple(t for t in self.tools if t.again and base_pool(t.parameter(t.again).pool) in LOOKED_UP_POOLS)

    @cached_property
    def doubled(self) -> tuple[Tool, ...]:
        """Tools with a phrasing for two values at once."""
        return tuple(tool for tool in self.tools if tool.wording(self.language).both)

    @cached_property
    def misspellable(self) -> tuple[tuple[Tool, str], ...]:
        """Tools and the parameter in which a user may err so that the tool can still guess what was meant."""
        pools = {"city", "person", "restaurant"} if self.language == "en" else {"city"}
        return tuple((tool, p.key) for tool in self.tools for p in tool.parameters if p.required and p.pool in pools)

    @cached_property
    def incomplete(self) -> tuple[tuple[Tool, str, tuple[str, ...]], ...]:
        """Tools, a required parameter that can go unsaid, and the phrasings that leave it out."""
        found = []
        for tool in self.tools:
            for parameter in tool.parameters:
                asks = tuple(ask for ask in tool.wording(self.language).asks if _alone_in_brackets(ask, parameter.key))
                if parameter.required and asks:
                    found.append((tool, parameter.key, asks))
        return tuple(found)


def _alone_in_brackets(phrasing: str, key: str) -> bool:
    return any(segment.bracketed and segment.slots == {key} for segment in segments(phrasing))


@cache
def shelf(language: Language, part: Part, unseen_tools: bool) -> Shelf:
    """The tools of `language`; with `unseen_tools` only those of `part`."""
    tools = tuple(tool for tool in TOOLS if language == "en" or tool.zh is not None)
    if unseen_tools:
        tools = tuple(tool for tool in tools if (tool.family in HELDOUT_FAMILIES) == (part == "heldout"))
    return Shelf(language, tools)
