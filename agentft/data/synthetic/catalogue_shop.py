"""Tools for orders, products and parcels."""

from __future__ import annotations

from agentft.data.synthetic.tools import Parameter, Tool, Wording

_ORDER = Parameter("order", "order", "order_id order order_number", "order number", "订单号")
_PERSON = Parameter("person", "person", "name person full_name who", "full name", "姓名")

SHOP = (
    Tool(
        "order_status",
        "shop",
        ("order status", "get order", "check order", "order info"),
        (_ORDER,),
        {"status": "order_state", "date": "date"},
        Wording(
            ("Status of an order", "Look up an order"),
            "check the order",
            (
                "Where is my order[ {order}]?",
                "What is the status of my order[ {order}]?",
                "Has order {order} been sent?",
            ),
            ("Order {order} is {status}, last change on {date}.", "Your order {order} is {status} since {date}."),
            ("What is the status of the orders {order} and {order2}?",),
        ),
        Wording(
            ("查询订单状态", "订单查询"),
            "查询订单",
            ("我的订单[{order}]到哪了？", "查一下订单[{order}]的状态。"),
            ("订单{order}{status}，更新于{date}。", "{order}目前{status}，时间{date}。"),
            ("订单{order}和{order2}什么状态？",),
        ),
        again="order",
    ),
    Tool(
        "order_find",
        "shop",
        ("find order", "search orders", "order search", "last order"),
        (_PERSON,),
        {"order": "order", "item": "product"},
        Wording(
            ("Find the last order of a customer", "Search orders by name"),
            "find the order",
            (
                "Find the last order of {person}.",
                "What did {person} order last?",
                "Look up the latest order for {person}.",
            ),
            ("The last order of {person} is {order}, a {item}.", "{person} ordered a {item}, number {order}."),
            ("Find the last orders of {person} and {person2}.",),
        ),
        Wording(
            ("查找客户最近的订单", "按姓名找订单"),
            "查找订单",
            ("{person}最近的订单是什么？", "找一下{person}的订单。"),
            ("{person}最近订了{item}，订单号{order}。", "订单{order}：{person}，{item}。"),
        ),
        again="person",
    ),
    Tool(
        "order_cancel",
        "shop",
        ("cancel order", "stop order", "order cancellation", "withdraw order"),
        (_ORDER, Parameter("reason", "reason", "reason why cause", "reason", "原因", False)),
        {"refund": "price"},
        Wording(
            ("Cancel an order", "Stop an order"),
            "cancel the order",
            (
                "Cancel my order[ {order}].[ Reason: {reason}.]",
                "I want to cancel order {order}[, {reason}].",
                "Please stop order {order}[ because: {reason}].",
            ),
            (
                "Order {order} is cancelled, {refund} dollars come back to you.",
                "I cancelled {order}. Your refund is {refund} dollars.",
            ),
            ("Cancel the orders {order} and {order2}.",),
        ),
        Wording(
            ("取消订单", "撤销订单"),
            "取消订单",
            ("取消订单[{order}][，原因是{reason}]。", "我不要订单{order}了，取消吧[，因为{reason}]。"),
            ("订单{order}已取消，退款{refund}元。", "已取消{order}，将退回{refund}元。"),
            ("取消订单{order}和{order2}。",),
        ),
        again="order",
    ),
    Tool(
        "product_search",
        "shop",
        ("search product", "find product", "product search", "shop search"),
        (
            Parameter("product", "product", "query product item", "product", "商品"),
            Parameter("budget", "budget", "max_price price_limit budget", "highest price", "最高价", False),
        ),
        {"product_id": "product_id", "price": "price"},
        Wording(
            ("Search the shop", "Find a product"),
            "search the shop",
            (
                "Do you sell a {product}?[ At most {budget} dollars.]",
                "I am looking for a {product}[ under {budget} dollars].",
                "Search the shop for a {product}[, up to {budget} dollars].",
            ),
            (
                "We have a {product} for {price} dollars, number {product_id}.",
                "The {product} is number {product_id} and costs {price} dollars.",
            ),
        ),
        Wording(
            ("搜索商品", "查找商品"),
            "搜索商品",
            ("有没有{product}？[不超过{budget}元。]", "帮我找{product}[，{budget}元以内]。"),
            ("有一款{product}，{price}元，编号{product_id}。", "{product}编号{product_id}，价格{price}元。"),
        ),
        again="product",
    ),
    Tool(
        "cart_add",
        "shop",
        ("add to cart", "cart add", "put in basket", "add cart item"),
        (
            Parameter("product_id", "product_id", "product_id item_id product", "product number", "商品编号"),
            Parameter("quantity", "quantity", "quantity count pieces", "number of pieces", "数量"),
        ),
        {"delivery": "date"},
        Wording(
            ("Put a product into the cart", "Add to the basket"),
            "fill the cart",
            (
                "Add {quantity} pieces of {product_id} to my cart.",
                "Put {product_id} in my basket[, {quantity} pieces].",
                "I want {quantity} of product {product_id} in the cart.",
            ),
            (
                "{quantity} of {product_id} are in your cart, delivery on {delivery}.",
                "Your cart has {quantity} pieces of {product_id}, they arrive on {delivery}.",
            ),
        ),
        Wording(
            ("加入购物车", "添加商品"),
            "加入购物车",
            ("把{quantity}件{product_id}加入购物车。", "购物车加{product_id}，要{quantity}件。"),
            (
                "已加入{quantity}件{product_id}，{delivery}送达。",
                "购物车中有{quantity}件{product_id}，预计{delivery}送达。",
            ),
        ),
    ),
)

PARCEL = (
    Tool(
        "parcel_track",
        "parcel",
        ("track parcel", "parcel status", "track package", "shipment tracking"),
        (Parameter("parcel", "parcel", "tracking_number parcel_id code", "tracking number", "快递单号"),),
        {"status": "parcel_state", "city": "city"},
        Wording(
            ("Track a parcel", "Where a parcel is"),
            "track the parcel",
            (
                "Where is my parcel[ {parcel}]?",
                "Track the package[ {parcel}], please.",
                "Has my parcel[ {parcel}] arrived?",
            ),
            ("Parcel {parcel} is {status} in {city}.", "Your parcel {parcel} was last seen in {city}: {status}."),
            ("Track the parcels {parcel} and {parcel2}.",),
        ),
        Wording(
            ("查询快递", "快递跟踪"),
            "查询快递",
            ("快递[{parcel}]到哪了？", "查一下[{parcel}这个]快递。"),
            ("快递{parcel}{status}，在{city}。", "{parcel}目前{status}，位置{city}。"),
            ("快递{parcel}和{parcel2}到哪了？",),
        ),
        again="parcel",
    ),
    Tool(
        "parcel_price",
        "parcel",
        ("parcel price", "shipping cost", "get postage", "shipping price"),
        (
            Parameter("city", "city", "city destination to", "destination city", "目的城市"),
            Parameter("kilograms", "kilograms", "weight kilograms weight_kg", "weight in kg", "重量（公斤）"),
        ),
        {"price": "price"},
        Wording(
            ("Price of sending a parcel", "Shipping cost"),
            "look up the price",
            (
                "What does it cost to send {kilograms} kg[ to {city}]?",
                "Postage for a parcel of {kilograms} kg[ to {city}]?",
                "I want to ship {kilograms} kg[ to {city}]. What is the price?",
            ),
            (
                "Sending {kilograms} kg to {city} costs {price} dollars.",
                "The price to {city} is {price} dollars for {kilograms} kg.",
            ),
        ),
        Wording(
            ("查询运费", "快递价格"),
            "查询运费",
            ("寄{kilograms}公斤[到{city}]多少钱？", "[到{city}的]{kilograms}公斤快递运费是多少？"),
            ("寄{kilograms}公斤到{city}要{price}元。", "到{city}的运费是{price}元。"),
        ),
        again="city",
    ),
    Tool(
        "parcel_pickup",
        "parcel",
        ("order pickup", "schedule pickup", "parcel pickup", "request courier"),
        (
            Parameter("date", "date", "date day pickup_date", "pickup date", "取件日期"),
            Parameter("quantity", "quantity", "parcels count number", "number of parcels", "件数"),
        ),
        {"code": "ticket"},
        Wording(
            ("Order a pickup of parcels", "Have parcels collected"),
            "order the pickup",
            (
                "Collect {quantity} parcels[ on {date}].",
                "I have {quantity} parcels to be picked up[ on {date}].",
                "Send a courier[ on {date}] for {quantity} parcels.",
            ),
            (
                "The courier comes on {date} for {quantity} parcels, code {code}.",
                "Pickup {code}: {quantity} parcels on {date}.",
            ),
        ),
        Wording(
            ("预约上门取件", "叫快递员"),
            "预约取件",
            ("[{date}]来取{quantity}件快递。", "预约[{date}]上门取件，共{quantity}件。"),
            ("快递员{date}上门取{quantity}件，取件码{code}。", "已预约{date}，{quantity}件，取件码{code}。"),
        ),
        again="date",
    ),
)

SHOPPING = (*SHOP, *PARCEL)
