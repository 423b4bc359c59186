"""Twenty ideas, each said in three ways that share few runs of words."""

PARAPHRASES = [
    ["The train to Busan was delayed by two hours because of heavy snow.", "Because it snowed so hard, our train to Busan came two hours late.", "Heavy snowfall made the Busan train two hours late."],
    ["To make a good omelette, beat three eggs and cook them slowly in butter.", "Whisk three eggs and let them set gently in butter for a nice omelette.", "A fine omelette needs three beaten eggs, butter and a low flame."],
    ["Regular exercise lowers the risk of heart disease.", "People who work out often are less likely to get heart disease.", "Your heart disease risk goes down when you exercise regularly."],
    ["The cat slept on the warm windowsill all afternoon.", "All afternoon long the cat was asleep on the sunny windowsill.", "Our cat spent the whole afternoon napping on the windowsill in the sun."],
    ["The central bank raised interest rates by half a percent to fight inflation.", "To curb inflation, interest rates were lifted half a percentage point by the central bank.", "Interest rates went up 0.5% as the central bank tried to control inflation."],
    ["Photosynthesis turns sunlight, water and carbon dioxide into sugar and oxygen.", "In photosynthesis, plants use light to make sugar and oxygen from water and carbon dioxide.", "Plants produce oxygen and sugar out of carbon dioxide and water by photosynthesis."],
    ["She learned to play the violin when she was only five years old.", "At the age of five she had already started playing the violin.", "She was just five when she took up the violin."],
    ["The old bridge over the river was closed for repairs last week.", "Last week they shut the old river bridge so that it could be repaired.", "Repairs forced the closing of the old bridge across the river a week ago."],
    ["Napoleon was defeated at the battle of Waterloo in 1815.", "In 1815 Napoleon lost the battle of Waterloo.", "Waterloo, fought in 1815, ended in Napoleon's defeat."],
    ["You should back up your computer files to an external drive every week.", "Once a week, copy the files of your computer to an external drive as a backup.", "Make weekly backups of your computer on an external hard drive."],
    ["The striker scored three goals and won the football match for her team.", "Thanks to the striker's three goals, her team won the football match.", "Her hat-trick gave the striker's football team the victory in the match."],
    ["Honey bees dance to tell other bees where flowers are.", "By dancing, honey bees show the other bees the way to flowers.", "A honey bee's dance tells its fellow bees the location of flowers."],
    ["The restaurant around the corner serves the best noodle soup in town.", "For the finest noodle soup in town go to the restaurant round the corner.", "Nobody in town makes better noodle soup than the restaurant at the corner."],
    ["He forgot his umbrella and got completely wet in the rain.", "Without the umbrella he had left behind, the rain soaked him.", "He was drenched by the rain since he did not bring his umbrella."],
    ["The moon causes the ocean tides through its gravity.", "Ocean tides are caused by the gravitational pull of the moon.", "It is the moon's gravity that makes the tides of the ocean."],
    ["The museum is free for students on Sundays.", "On Sundays students do not pay to enter the museum.", "Students get free entry to the museum every Sunday."],
    ["Her grandmother grew tomatoes and beans in a small garden behind the house.", "In the little garden behind her house, grandmother raised beans and tomatoes.", "Behind the house, her grandma had a small vegetable garden with tomatoes and beans."],
    ["The phone's battery lasts only four hours after the latest software update.", "Since the last software update, the phone battery is empty after four hours.", "After updating its software, the phone runs just four hours on a battery charge."],
    ["Learning a foreign language takes patience and daily practice.", "You need patience and must practise daily to learn a foreign language.", "With patience and practice every day one can learn a foreign language."],
    ["The company will open a new car factory in Mexico next year.", "Next year a new car plant is going to be opened in Mexico by the company.", "A Mexican car factory will be launched by the company in the coming year."],
]  # fmt: skip
