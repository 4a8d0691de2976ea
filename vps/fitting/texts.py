"""Text that calibrations are not fitted on, by which their side effects are measured."""

OTHER_TEXTS = (
    "The river rises in the hills north of the town and runs for forty miles before it meets the "
    "sea. In spring the melting snow fills it to the top of its banks, and the meadows on both "
    "sides stand under water for weeks. In late summer children can walk across it.",
    "A lighthouse keeper used to light the lamp at dusk and trim its wick every four hours. Most "
    "lamps are electric now and switched by a clock, so nobody lives in the tower any more. The "
    "last keeper on this coast retired in 1998 and opened a bakery in the village.",
    "Bread is made from flour, water, salt and yeast. The dough is kneaded until it is smooth, "
    "left to rise in a warm place until it has doubled in size, shaped into loaves and baked in a "
    "hot oven until the crust sounds hollow when it is tapped.",
    "The committee met on Tuesday to discuss the new library. Several members thought that the "
    "building was too expensive; others answered that the old one leaked and had no room for the "
    "children's books. After two hours they agreed to ask for a second estimate.",
    "Bees find their way home by the position of the sun. When the sky is covered they use the "
    "pattern of polarized light, which they can see and people cannot. A bee that has found "
    "flowers tells the others about it with a dance that shows direction and distance.",
    "She had promised to write as soon as she arrived, but the days passed and no letter came. "
    "Her brother went down to the harbour every morning to ask the captains of the incoming ships "
    "for news. At last one of them handed him a small parcel wrapped in brown paper.",
    "In a computer, memory is divided into pages of equal size. A program sees addresses of its "
    "own, which the processor translates with the help of a table. If a page is not in memory, "
    "the operating system reads it from the disk and lets the program go on.",
    "The orchestra played the overture too fast, and the singers came in late. The conductor, who "
    "had only arrived that afternoon, stopped after the first scene, apologized to the audience "
    "and began again. The second time everything went well, and the applause lasted for minutes.",
    "Glaciers move slowly downhill under their own weight. They carry stones of every size with "
    "them, which scratch the rock beneath the ice. Where a glacier ends it leaves these stones in "
    "long ridges, from which one can tell how far it once reached.",
    "To repot the plant, water it a day before, turn the pot upside down and tap the rim against "
    "a table. Shake the old soil from the roots, cut away those that are brown and soft, and set "
    "the plant into fresh soil in a pot that is only a little wider than the old one.",
    "The train was meant to leave at noon, but the engine would not start. The passengers sat on "
    "their suitcases in the shade of the station roof. A man with an accordion played for them, "
    "and by the time the second engine came nobody was in a hurry any longer.",
    "Vaccines show the immune system a harmless part of a virus or a bacterium. The body makes "
    "antibodies against it and keeps cells that remember it. When the real germ arrives later, "
    "these cells multiply quickly, and most people do not fall ill.",
)
