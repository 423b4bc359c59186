"""Twenty groups of three sentences that say the same in other words, written by hand, to try scorers of meaning on."""

from __future__ import annotations

GROUPS: tuple[tuple[str, str, str], ...] = (
    (
        "The cat is sleeping on the warm windowsill.",
        "On the sunny window ledge, the cat lies asleep.",
        "A cat naps on the sill of the warm window.",
    ),
    (
        "Add the two numbers and then divide the sum by two.",
        "Sum up both numbers and halve the result.",
        "Take the average by adding both numbers and dividing by 2.",
    ),
    (
        "The train to Berlin was delayed by forty minutes.",
        "Our Berlin train arrived forty minutes late.",
        "There was a delay of forty minutes for the train going to Berlin.",
    ),
    (
        "Boil the pasta in salted water for nine minutes.",
        "Cook the noodles nine minutes in boiling water with salt.",
        "The pasta should be boiled for nine minutes in salty water.",
    ),
    (
        "She won the tennis tournament after a very long final.",
        "After a lengthy final match, she became the tennis champion.",
        "The tennis tournament was won by her in a long final.",
    ),
    (
        "Heavy rain flooded many streets in the old town.",
        "Streets of the old town were under water after the heavy rain.",
        "The downpour caused flooding in the old town's streets.",
    ),
    (
        "The company will close its factory at the end of the year.",
        "By year's end the firm is going to shut down its plant.",
        "The factory of the company shuts when the year ends.",
    ),
    (
        "Vitamin C can be found in oranges and other citrus fruit.",
        "Oranges and other citrus fruits contain vitamin C.",
        "Citrus fruit such as oranges is a source of vitamin C.",
    ),
    (
        "He forgot his umbrella and got soaked on the way home.",
        "Without the umbrella he had forgotten, he came home dripping wet.",
        "He left his umbrella behind and was soaked walking home.",
    ),
    (
        "Use a prime sieve to list all primes below one hundred.",
        "All prime numbers under 100 can be listed with a sieve.",
        "List the primes below a hundred by sieving.",
    ),
    (
        "The museum is closed on Mondays and on public holidays.",
        "On Mondays and public holidays the museum does not open.",
        "You cannot visit the museum on a Monday or a holiday, as it is closed.",
    ),
    (
        "The spacecraft landed safely on the surface of Mars.",
        "A safe landing on Mars was made by the spacecraft.",
        "The space probe touched down on Mars without damage.",
    ),
    (
        "Please restart the computer after installing the update.",
        "Once the update is installed, reboot your computer.",
        "The computer has to be restarted when the update has been installed.",
    ),
    (
        "The violinist played the concerto from memory.",
        "Without sheet music, the violinist performed the concerto.",
        "The violin concerto was played by heart by the violinist.",
    ),
    (
        "Bees are important because they pollinate many crops.",
        "Many crops are pollinated by bees, which makes them important.",
        "Bees matter since they pollinate a lot of our crops.",
    ),
    (
        "The bank raised its interest rates for the third time this year.",
        "For the third time this year, interest rates were increased by the bank.",
        "This year the bank has put up interest rates three times.",
    ),
    (
        "A small dog chased the postman down the street.",
        "The postman was chased down the street by a little dog.",
        "Down the road, a small dog ran after the mailman.",
    ),
    (
        "The mountain path is too dangerous to walk in winter.",
        "In winter it is too risky to hike the mountain trail.",
        "Walking the mountain path is dangerous during the winter.",
    ),
    (
        "The library lends electronic books to its members for free.",
        "Members can borrow e-books from the library at no cost.",
        "Free e-book lending is offered by the library to its members.",
    ),
    (
        "The doctor advised him to stop smoking at once.",
        "He was told by his doctor to quit smoking immediately.",
        "The physician's advice was that he give up cigarettes right away.",
    ),
)
