"""What `growmerge verify` scores without --text: about a thousand tokens of English, written for this purpose."""

TEXT = """
The ferry left the harbour a little after six, when the fog had thinned enough for the pilot to see the second buoy.
Most of the passengers slept; a few stood at the rail and watched the lights of the town grow small. In the wheelhouse
the radio reported wind from the north-west, eight metres a second, rising towards evening. "We will be early," said
the mate, and poured the last of the coffee into two cups. A farmer from the island had brought forty hens in wooden
crates, and their owner counted them twice, once before and once after the children had been told to leave the latches
alone. Prices had risen again: a crate that cost 120 in spring now cost 135, and feed was dearer still. What is the use
of keeping birds, his brother had asked, if the eggs pay for the grain and nothing else? The answer, which he did not
give, was that he liked the noise in the morning. Between the skerries the swell died down. Engines were slowed, ropes
made ready; on the quay three cars, a tractor and a bicycle waited for the ramp to come down, and behind them stood the
school, the shop and the church, in that order, as they had stood on every map since 1874.

To bake a plain rye loaf, mix 400 grams of coarse flour with half a litre of lukewarm water and a spoonful of sour
dough, cover the bowl, and leave it overnight in a place without draught. In the morning add salt, a little honey and
as much wheat flour as the dough will take without becoming stiff. It should cling to the spoon but not to the table.
Fill two tins to the half, wait until the dough has reached the rim, and bake at 220 degrees for ten minutes, then at
180 for fifty. Do not cut the bread on the first day: it is moist inside and will stick to the knife. Wrapped in linen
it keeps for a week, and toasted it is better on the fifth day than on the second.

Water expands when it freezes, which is unusual. Most liquids shrink as they turn solid, because their molecules can be
packed more closely at rest than in motion. In ice each molecule holds four neighbours at fixed angles, and the lattice
that results has more empty space than the liquid had. A block of ice therefore floats with about a tenth of its volume
above the surface. Lakes freeze from the top, and fish survive the winter below. The same effect breaks stone: rain
enters a crack, freezes, widens it, thaws, and runs a little deeper the next time. Over a thousand winters a cliff
becomes a slope. Engineers allow for it in roads, pipes and foundations; where they forget, the frost reminds them.

The committee met on Tuesday to decide about the old bridge. Three proposals had been received. The first, to repair
the arches and keep the bridge open to traffic, would take two summers and cost more than the town had. The second was
to close it to cars and leave it to walkers. The third, put forward by a company from the capital, was to pull it down
and build something in steel. Nobody spoke for the third. Mrs Holm, who has lived beside the river for sixty years, said
that a bridge was not a monument but a way across, and that people who wanted to look at it could do so from either
bank. The mayor thanked her. By seven votes to four the second proposal was accepted, on condition that the lamps be
mended before October.

"Where did you learn to play?" she asked. He shrugged. "My aunt had a piano nobody used. In winter there was nothing
else to do, so I pressed the keys until some of them sounded right together." He played a slow phrase, stopped, and
played it again with the last note lowered. "That one is sadder," she said. "No, it only waits longer." Outside a tram
went by and the glasses on the shelf began to ring, very softly, a quarter tone above the piano.

A list is sorted by comparing neighbours and exchanging those that stand the wrong way round; after one pass the largest
item has reached the end. Repeating this for every item but the last takes about n squared over two comparisons, which
is acceptable for ten items and hopeless for ten million. Better methods divide the list, sort both halves and merge
them: each item is then looked at once a level, and there are only as many levels as n can be halved. That difference,
between n squared and n times its logarithm, is the reason why a telephone can search a library.

In the second winter the survey party reached the lake. The maps showed an island with a hut; they found the island
and, after an hour of digging, a chimney. Inside stood a table, two benches and a stove that drew badly. Someone had
written a list of names on the wall with the year beside each, the oldest 1911, the last before theirs 1958. They added
four more. At night the ice sang: long falling notes, as if a wire were stretched from shore to shore and slowly
slackened. Ingrid, who measured temperatures, explained that the sheet was shrinking in the cold and that the sound ran
through it faster than through air, the high tones ahead of the low. Nobody slept much. On the third day the wind turned
south, the surface grew wet, and they left with half of the holes undrilled, forty samples instead of ninety, and a
promise to come back, which one of them kept.
"""
