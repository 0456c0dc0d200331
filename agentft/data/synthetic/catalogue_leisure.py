"""Tools for spare time: food, media, sport."""

from __future__ import annotations

from agentft.data.synthetic.tools import Parameter, Tool, Wording

FOOD = (
    Tool(
        "restaurant_find",
        "food",
        ("find restaurant", "search restaurants", "restaurant search", "suggest restaurant"),
        (
            Parameter("city", "city", "city location town", "city", "城市"),
            Parameter("cuisine", "cuisine", "cuisine food food_type", "cuisine", "菜系"),
        ),
        {"restaurant": "restaurant", "rating": "count"},
        Wording(
            ("Find a restaurant", "Search restaurants in a city"),
            "find a restaurant",
            (
                "Find a restaurant with {cuisine} food[ in {city}].",
                "Where can I eat {cuisine} food[ in {city}]?",
                "I feel like {cuisine} food[ in {city}]. Any restaurant?",
            ),
            (
                "Try {restaurant} in {city}, {rating} of 9 points.",
                "{restaurant} serves {cuisine} food and has {rating} of 9 points.",
            ),
        ),
        Wording(
            ("搜索餐厅", "查找餐厅"),
            "查找餐厅",
            ("[{city}]哪里能吃{cuisine}？", "在[{city}]找一家{cuisine}餐厅。"),
            ("推荐{restaurant}，评分{rating}分。", "{city}的{restaurant}不错，{rating}分。"),
        ),
        again="city",
    ),
    Tool(
        "table_book",
        "food",
        ("book table", "reserve table", "table booking", "restaurant reservation"),
        (
            Parameter("restaurant", "restaurant", "restaurant restaurant_name venue", "restaurant", "餐厅"),
            Parameter("guests", "guests", "guests people party_size", "number of guests", "人数"),
            Parameter("time", "time", "time at arrival_time", "time", "时间"),
            Parameter("outdoor", "with_without", "outdoor outside terrace", "outdoor seating", "是否要包间", False),
        ),
        {"booking": "booking"},
        Wording(
            ("Book a table in a restaurant", "Reserve a table"),
            "book the table",
            (
                "Book a table at {restaurant} for {guests} people[ at {time}][ {outdoor} outdoor seating].",
                "Reserve {restaurant} for {guests}[ at {time}][, {outdoor} outdoor seating].",
                "We are {guests} people and want a table at {restaurant}[ at {time}][ {outdoor} outdoor seating].",
            ),
            (
                "Your table for {guests} at {restaurant} at {time} is booked: {booking}.",
                "Booking {booking}: {restaurant}, {time}, {guests} people.",
            ),
        ),
        Wording(
            ("预订餐厅座位", "订位"),
            "预订座位",
            (
                "订{restaurant}，{guests}人[，{time}][，{outdoor}包间]。",
                "帮我在{restaurant}订{guests}个人的位子[，{time}到][，{outdoor}包间]。",
            ),
            (
                "{restaurant}{time}，{guests}人的座位已订好，编号{booking}。",
                "已预订{restaurant}，{time}，{guests}人，编号{booking}。",
            ),
        ),
    ),
    Tool(
        "recipe_find",
        "food",
        ("find recipe", "search recipes", "get recipe", "recipe lookup"),
        (Parameter("dish", "dish", "dish meal recipe_name", "dish"),),
        {"minutes": "minutes", "ingredients": "ingredient*2"},
        Wording(
            ("Find a recipe", "Recipe of a dish"),
            "find a recipe",
            ("How do I make {dish}?", "Find me a recipe for {dish}.", "I want to cook {dish}. What do I need?"),
            (
                "For {dish} you need {ingredients} and {minutes} minutes.",
                "{dish} takes {minutes} minutes; you need {ingredients}.",
            ),
        ),
        again="dish",
    ),
)

MEDIA = (
    Tool(
        "song_find",
        "media",
        ("find song", "search music", "song search", "lookup song"),
        (Parameter("person", "person", "artist singer performer", "artist"),),
        {"song": "title", "song_id": "song_id"},
        Wording(
            ("Find the top song of an artist", "Search music by artist"),
            "search the music library",
            (
                "What is the best known song by {person}?",
                "Search for music by {person}.",
                "Find me a song by {person}.",
            ),
            ("{person} is best known for {song}, number {song_id}.", "I found {song} by {person} ({song_id})."),
            ("Find a song by {person} and one by {person2}.",),
        ),
        again="person",
    ),
    Tool(
        "song_play",
        "media",
        ("play song", "start playback", "play track", "play music"),
        (
            Parameter("song_id", "song_id", "song_id id track", "song number"),
            Parameter("room", "room", "room speaker where", "room to play in", required=False),
        ),
        {"seconds": "minutes"},
        Wording(
            ("Play a song by number", "Start playing a track"),
            "play the song",
            (
                "Play song {song_id}[ in the {room}].",
                "Put on track {song_id}[ in the {room}].",
                "I want to hear {song_id}[, in the {room}].",
            ),
            ("Playing {song_id}, it starts in {seconds} seconds.", "Song {song_id} starts in {seconds} seconds."),
        ),
        again="song_id",
    ),
    Tool(
        "playlist_create",
        "media",
        ("create playlist", "new playlist", "make playlist", "add playlist"),
        (Parameter("title", "title", "title name playlist_name", "playlist name"),),
        {"playlist": "song_id"},
        Wording(
            ("Create a playlist", "Make a new playlist"),
            "create the playlist",
            (
                "Make a playlist called {title}.",
                "Create a new playlist with the name {title}.",
                "I need a playlist named {title}.",
            ),
            ("The playlist {title} is ready, number {playlist}.", "I created {title} ({playlist})."),
            ("Make two playlists, {title} and {title2}.",),
        ),
        again="title",
    ),
    Tool(
        "image_draw",
        "media",
        ("draw image", "generate image", "make picture", "create image"),
        (
            Parameter("product", "product", "subject prompt what", "what to draw", "绘制内容"),
            Parameter("style", "image_style", "style look image_style", "style", "风格"),
        ),
        {"image": "note_id"},
        Wording(
            ("Draw an image", "Generate a picture"),
            "draw the image",
            (
                "Draw a picture of a {product}[ as a {style}].",
                "Make an image that shows a {product}[, style {style}].",
                "I need a {style} of a {product}.",
            ),
            ("Your {style} of a {product} is image {image}.", "Image {image} shows the {product} as a {style}."),
        ),
        Wording(
            ("生成图片", "画图"),
            "生成图片",
            ("画一张{style}风格的{product}。", "生成一张{product}的图片，风格为{style}。"),
            ("{style}风格的{product}已生成，图片编号{image}。", "图片{image}已完成：{product}，{style}风格。"),
        ),
        again="product",
    ),
)

_TEAM = Parameter("team", "city", "team club side", "team")

SPORT = (
    Tool(
        "match_score",
        "sport",
        ("match score", "get score", "live score", "game result"),
        (_TEAM,),
        {"score": "count", "opponent": "city", "conceded": "count"},
        Wording(
            ("Score of the last match of a team", "Latest result of a team"),
            "look up the score",
            (
                "How did {team} play in the last match?",
                "What was the score of the {team} game?",
                "Tell me the latest result of {team}.",
            ),
            (
                "{team} played {score} to {conceded} against {opponent}.",
                "The score was {score} to {conceded} for {team} against {opponent}.",
            ),
            ("What are the latest results of {team} and {team2}?",),
        ),
        again="team",
    ),
    Tool(
        "match_next",
        "sport",
        ("next match", "get next match", "upcoming game", "match schedule"),
        (_TEAM,),
        {"opponent": "city", "date": "date"},
        Wording(
            ("Next match of a team", "When a team plays next"),
            "look up the next match",
            (
                "When does {team} play next?",
                "What is the next game of {team}?",
                "Who does {team} meet in the next match?",
            ),
            ("{team} meets {opponent} on {date}.", "The next match of {team} is against {opponent} on {date}."),
            ("When do {team} and {team2} play next?",),
        ),
        again="team",
    ),
)

LEISURE = (*FOOD, *MEDIA, *SPORT)
