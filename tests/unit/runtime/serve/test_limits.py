"""Turns: requests run round robin over clients, and a client that goes away keeps no place."""

import asyncio

from upperson_console.limits import Turns


def test_a_request_that_ends_as_its_turn_comes_gives_its_place_to_the_next():
    async def run():
        turns = Turns(1)
        await turns.begin("a")
        second, third = (asyncio.ensure_future(turns.begin(one)) for one in "bc")
        await asyncio.sleep(0)
        turns.end()  # Gives the place to b, which has not run yet.
        second.cancel()
        await asyncio.wait_for(third, 10)
        turns.end()
        await asyncio.wait_for(turns.begin("d"), 10)

    asyncio.run(run())


def test_clients_take_turns_however_many_requests_one_has():
    async def run():
        turns, order = Turns(1), []
        await turns.begin("a")

        async def one(client):
            await turns.begin(client)
            order.append(client)
            turns.end()

        waiting = [asyncio.ensure_future(one(client)) for client in "aaaab"]
        await asyncio.sleep(0)
        turns.end()
        await asyncio.wait_for(asyncio.gather(*waiting), 10)
        return order

    assert asyncio.run(run()).index("b") <= 1
