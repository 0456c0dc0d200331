"""Tools for the road: flights, trains, hotels, maps."""

from __future__ import annotations

from agentft.data.synthetic.tools import Parameter, Tool, Wording

_ORIGIN = Parameter("origin", "city", "origin from_city departure depart_from", "departure city", "出发城市")
_DESTINATION = Parameter(
    "destination", "city2", "destination to_city arrival arrive_at", "destination city", "到达城市"
)
_DATE = Parameter("date", "date", "date day travel_date", "travel date", "日期")
_PASSENGER = Parameter("person", "person", "passenger traveler name guest_name", "full name", "姓名")

TRAVEL = (
    Tool(
        "flight_search",
        "travel",
        ("search flights", "find flight", "flight search", "lookup flights"),
        (
            _ORIGIN,
            _DESTINATION,
            _DATE,
            Parameter("cabin", "cabin", "cabin cabin_class travel_class", "cabin class", "舱位", False),
        ),
        {"flight": "flight", "departs": "time", "price": "fare"},
        Wording(
            ("Search flights between cities", "Find a flight"),
            "search flights",
            (
                "Find a flight from {origin} to {destination}[ on {date}][ in {cabin} class].",
                "I want to fly from {origin} to {destination}[ on {date}].[ Cabin: {cabin}.]",
                "Is there a flight[ on {date}] from {origin} to {destination}[ in {cabin}]?",
            ),
            (
                "Flight {flight} leaves {origin} at {departs} and costs {price} dollars.",
                "I found {flight} at {departs} for {price} dollars.",
            ),
        ),
        Wording(
            ("查询航班", "搜索机票"),
            "查询航班",
            (
                "查[{date}]从{origin}到{destination}的航班[，{cabin}]。",
                "我想[{date}]从{origin}飞{destination}[，坐{cabin}]。",
            ),
            ("{flight}航班{departs}起飞，票价{price}元。", "有{flight}，{departs}从{origin}出发，{price}元。"),
        ),
        again="date",
    ),
    Tool(
        "train_search",
        "travel",
        ("search trains", "find train", "train search", "rail connections"),
        (_ORIGIN, _DESTINATION, _DATE),
        {"train": "index", "departs": "time", "price": "fare"},
        Wording(
            ("Search trains between cities", "Find a train"),
            "search trains",
            (
                "Find a train from {origin} to {destination}[ on {date}].",
                "I need to go by train from {origin} to {destination}[ on {date}].",
                "Which train goes[ on {date}] from {origin} to {destination}?",
            ),
            (
                "Train {train} leaves at {departs} and costs {price} dollars.",
                "Take train {train} at {departs}, {price} dollars.",
            ),
        ),
        Wording(
            ("查询火车票", "搜索列车"),
            "查询火车",
            ("查[{date}]{origin}到{destination}的火车。", "我想[{date}]坐火车从{origin}去{destination}。"),
            ("G{train}次{departs}发车，票价{price}元。", "可以坐G{train}次，{departs}出发，{price}元。"),
        ),
        again="date",
    ),
    Tool(
        "flight_status",
        "travel",
        ("flight status", "get flight status", "check flight", "track flight"),
        (Parameter("flight", "flight", "flight flight_number flight_no number", "flight number", "航班号"),),
        {"status": "flight_state", "gate": "count"},
        Wording(
            ("Status of a flight", "Is a flight on time"),
            "check the flight",
            ("What is the status of flight {flight}?", "Is {flight} on time?", "Check flight {flight} for me."),
            ("Flight {flight} is {status} at gate {gate}.", "{flight}: {status}, gate {gate}."),
            ("What is the status of the flights {flight} and {flight2}?",),
        ),
        Wording(
            ("查询航班动态", "航班状态"),
            "查询航班动态",
            ("{flight}航班现在什么情况？", "{flight}准点吗？", "查一下航班{flight}的状态。"),
            ("{flight}航班{status}，{gate}号登机口。", "{flight}目前{status}，登机口{gate}。"),
            ("{flight}和{flight2}这两个航班准点吗？",),
        ),
        again="flight",
    ),
    Tool(
        "flight_book",
        "travel",
        ("book flight", "reserve flight", "buy flight ticket", "flight booking"),
        (Parameter("flight", "flight", "flight flight_number flight_no", "flight number", "航班号"), _PASSENGER),
        {"booking": "booking"},
        Wording(
            ("Book a seat on a flight", "Buy a flight ticket"),
            "book the flight",
            (
                "Book flight {flight}[ for {person}].",
                "Reserve a seat on {flight}[ for {person}].",
                "Buy a ticket for flight {flight}[, passenger {person}].",
            ),
            (
                "{person} is booked on {flight}, booking {booking}.",
                "Booking {booking} is confirmed: {flight} for {person}.",
            ),
        ),
        Wording(
            ("预订航班", "购买机票"),
            "预订航班",
            ("给{person}订{flight}航班。", "预订{flight}，乘客是{person}。"),
            ("已为{person}订好{flight}，订单{booking}。", "{flight}预订成功，乘客{person}，订单{booking}。"),
        ),
    ),
)

HOTEL = (
    Tool(
        "hotel_search",
        "hotel",
        ("search hotels", "find hotel", "hotel search", "list hotels"),
        (
            Parameter("city", "city", "city location destination", "city", "城市"),
            Parameter("nights", "nights", "nights number_of_nights stay", "number of nights", "晚数"),
            Parameter("budget", "budget", "max_price budget price_limit", "highest price a night", "每晚最高价", False),
        ),
        {"hotel": "hotel", "hotel_id": "hotel_id"},
        Wording(
            ("Find a hotel in a city", "Search hotels"),
            "find a hotel",
            (
                "Find a hotel in {city}[ for {nights} nights][, at most {budget} dollars a night].",
                "I need a room in {city}[ for {nights} nights].[ My limit is {budget} dollars a night.]",
            ),
            ("{hotel} in {city} is free, number {hotel_id}.", "I suggest {hotel}, number {hotel_id}."),
        ),
        Wording(
            ("搜索酒店", "查找酒店"),
            "查找酒店",
            (
                "找{city}的酒店，住{nights}晚[，每晚不超过{budget}元]。",
                "我要在{city}住{nights}晚，帮我找酒店[，预算每晚{budget}元]。",
            ),
            ("{city}的{hotel}有房，编号{hotel_id}。", "推荐{hotel}，编号{hotel_id}。"),
        ),
        again="city",
    ),
    Tool(
        "hotel_book",
        "hotel",
        ("book hotel", "reserve hotel room", "hotel booking", "make hotel reservation"),
        (Parameter("hotel_id", "hotel_id", "hotel_id hotel hotel_number", "hotel number", "酒店编号"), _PASSENGER),
        {"booking": "booking"},
        Wording(
            ("Book a room in a hotel", "Reserve a hotel room"),
            "book the hotel",
            (
                "Book hotel {hotel_id}[ for {person}].",
                "Reserve a room in hotel {hotel_id}[ for {person}].",
                "I want to book {hotel_id}[ in the name of {person}].",
            ),
            (
                "Hotel {hotel_id} is booked for {person}, booking {booking}.",
                "Booking {booking}: hotel {hotel_id}, {person}.",
            ),
        ),
        Wording(
            ("预订酒店", "订房"),
            "预订酒店",
            ("给{person}订酒店{hotel_id}。", "预订{hotel_id}，入住人{person}。"),
            ("已为{person}订好{hotel_id}，订单{booking}。", "{hotel_id}预订成功，入住人{person}，订单{booking}。"),
        ),
    ),
    Tool(
        "hotel_cancel",
        "hotel",
        ("cancel hotel", "cancel booking", "cancel hotel reservation", "drop booking"),
        (Parameter("booking", "booking", "booking booking_number reservation", "booking number", "订单号"),),
        {"refund": "fare"},
        Wording(
            ("Cancel a hotel booking", "Cancel a room reservation"),
            "cancel the booking",
            (
                "Cancel hotel booking {booking}.",
                "I cannot come, please cancel my room, booking {booking}.",
                "Please cancel the reservation {booking}.",
            ),
            (
                "Booking {booking} is cancelled, you get {refund} dollars back.",
                "I cancelled {booking}. The refund is {refund} dollars.",
            ),
            ("Cancel the hotel bookings {booking} and {booking2}.",),
        ),
        Wording(
            ("取消酒店订单", "退房"),
            "取消订单",
            ("取消酒店订单{booking}。", "我去不了了，请退掉订单{booking}。"),
            ("订单{booking}已取消，退款{refund}元。", "已取消{booking}，将退{refund}元。"),
        ),
        again="booking",
    ),
)

MAPS = (
    Tool(
        "distance",
        "maps",
        ("get distance", "city distance", "measure distance", "distance between"),
        (_ORIGIN, _DESTINATION),
        {"kilometers": "kilometers"},
        Wording(
            ("Distance between two cities", "How far two cities are apart"),
            "measure the distance",
            (
                "How far is it from {origin} to {destination}?",
                "Distance between {origin} and {destination}?",
                "How many kilometers from {origin} to {destination}?",
            ),
            (
                "It is {kilometers} kilometers from {origin} to {destination}.",
                "{origin} and {destination} are {kilometers} kilometers apart.",
            ),
        ),
        Wording(
            ("两个城市的距离", "计算距离"),
            "计算距离",
            ("{origin}到{destination}有多远？", "{origin}离{destination}多少公里？"),
            ("{origin}到{destination}有{kilometers}公里。", "{origin}与{destination}相距{kilometers}公里。"),
        ),
        again="destination",
    ),
    Tool(
        "route",
        "maps",
        ("get route", "plan route", "get directions", "navigate"),
        (
            Parameter("place", "place", "destination place target to", "destination", "目的地"),
            Parameter("mode", "travel_mode", "mode travel_mode by", "way of travel", "出行方式"),
        ),
        {"minutes": "minutes", "kilometers": "kilometers"},
        Wording(
            ("Route to a place", "Directions to a place"),
            "plan the route",
            (
                "How do I get to {place}[ by {mode}]?",
                "Plan a route to {place}[, {mode}].",
                "Show me the way to {place}[, I am {mode}].",
            ),
            (
                "Getting to {place} takes {minutes} minutes, {kilometers} kilometers.",
                "{mode} to {place}: {minutes} minutes for {kilometers} kilometers.",
            ),
        ),
        Wording(
            ("规划到某地的路线", "导航"),
            "规划路线",
            ("[{mode}]去{place}怎么走？", "规划[{mode}]到{place}的路线。"),
            ("{mode}到{place}要{minutes}分钟，{kilometers}公里。", "去{place}全程{kilometers}公里，约{minutes}分钟。"),
        ),
        again="place",
    ),
    Tool(
        "nearby",
        "maps",
        ("find nearby", "search nearby", "nearby places", "places around"),
        (
            Parameter("category", "place_category", "category kind type", "kind of place", "类别"),
            Parameter("place", "place", "near around center", "place to search around", "附近地点"),
        ),
        {"found": "count", "meters": "minutes"},
        Wording(
            ("Find places near a place", "Search around a place"),
            "search the map",
            (
                "Are there any {category} near {place}?",
                "Show {category} around {place}.",
                "I am looking for {category} close to {place}.",
            ),
            (
                "There are {found} {category} near {place}, the closest at {meters} meters.",
                "I found {found} {category} around {place}; the nearest is {meters} meters away.",
            ),
        ),
        Wording(
            ("查找附近地点", "周边搜索"),
            "搜索周边",
            ("{place}附近有{category}吗？", "找一下{place}周边的{category}。"),
            (
                "{place}附近有{found}家{category}，最近的{meters}米。",
                "找到{found}家{category}，最近的离{place}{meters}米。",
            ),
        ),
        again="place",
    ),
)

ON_THE_ROAD = (*TRAVEL, *HOTEL, *MAPS)
