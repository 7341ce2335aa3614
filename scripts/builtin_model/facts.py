# ruff: noqa: E501 - a row of a table stays on one line
"""What the built-in model is taught: tables of plain facts, one row a line, columns divided by `|`, lists by `;`.

The tables are data for `corpus.py`, which turns them into sentences. A row is read by `rows`, which refuses a
row with the wrong number of columns, so that a slip in a table stops the training at its start.
"""

from __future__ import annotations


def rows(table: str, num_columns: int) -> list[list[str]]:
    """Split a table into stripped cells.

    Raises:
        ValueError: a row has another number of columns; the message shows the row.
    """
    cells = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    for row in cells:
        if len(row) != num_columns:
            raise ValueError(f"table row has {len(row)} columns, expected {num_columns}: {row}")
    return cells


def items(cell: str) -> list[str]:
    return [item.strip() for item in cell.split(";")]


# name | region | country | adjectives | sights | where it lies | weather | dish or drink
CITIES = """
San Francisco | California | the United States | hilly; foggy; beautiful; lively | the Golden Gate Bridge; its cable cars; its steep hills; the island of Alcatraz | on the west coast of the United States | cool and foggy | sourdough bread
San Francisco | California | the United States | large; famous; beautiful; busy | the Golden Gate Bridge; its cable cars; its colorful houses; its foggy summers | by the Pacific Ocean | mild and foggy | fresh crab
Los Angeles | California | the United States | sunny; huge; warm | Hollywood; its beaches; its film studios | on the west coast of the United States | warm and sunny | tacos
San Diego | California | the United States | sunny; relaxed | its zoo; its beaches | near the border with Mexico | warm and dry | fish tacos
New York | the state of New York | the United States | huge; busy; tall | the Statue of Liberty; Central Park; its tall buildings | on the east coast of the United States | cold in winter and hot in summer | bagels
Chicago | Illinois | the United States | windy; tall; busy | its tall buildings; its jazz and blues | on Lake Michigan | windy and cold in winter | deep pizza
Boston | Massachusetts | the United States | old; friendly | its universities; its old harbor | on the east coast of the United States | cold and snowy in winter | clam soup
Seattle | Washington | the United States | green; rainy | the Space Needle; its coffee shops | in the northwest of the United States | cool and rainy | coffee and salmon
Miami | Florida | the United States | warm; bright | its beaches; its bright houses | on the coast of Florida | hot and sunny | Cuban sandwiches
New Orleans | Louisiana | the United States | lively; musical | its jazz music; its carnival | on the Mississippi River | hot and humid | spicy stew
Washington | the east | the United States | green; quiet | the White House; its museums | on the Potomac River | hot in summer and cold in winter | crab cakes
Toronto | Ontario | Canada | large; modern | its tall tower; its many languages | on Lake Ontario | cold and snowy in winter | pancakes with maple syrup
Vancouver | British Columbia | Canada | green; clean | its mountains; its harbor | on the Pacific coast of Canada | mild and rainy | fresh salmon
Montreal | Quebec | Canada | lively; old | its music festivals; its old streets | on the Saint Lawrence River | cold and snowy in winter | bagels
Mexico City | the Valley of Mexico | Mexico | huge; old; colorful | its museums; its old temples | high in the mountains | mild and dry | tacos
Rio de Janeiro | the southeast | Brazil | beautiful; lively | its carnival; its beaches; the statue on the hill | on the Atlantic coast | hot and sunny | black bean stew
Buenos Aires | the east | Argentina | elegant; large | the tango; its wide streets | on the Rio de la Plata | mild and sunny | grilled beef
Lima | the west | Peru | large; cloudy | its old churches; its fresh fish | on the Pacific coast | mild and cloudy | raw fish with lime
London | England | the United Kingdom | large; old; rainy | Big Ben; Tower Bridge; its red buses | on the River Thames | cool and rainy | fish and chips
Edinburgh | Scotland | the United Kingdom | old; hilly; windy | its castle; its summer festival | near the North Sea | cool and windy | porridge
Dublin | Leinster | Ireland | friendly; old | its old library; its cheerful pubs | on the River Liffey | cool and rainy | stew and dark beer
Paris | the north | France | beautiful; elegant; famous | the Eiffel Tower; the Louvre; its cafes | on the River Seine | mild | fresh bread and cheese
Lyon | the east | France | old; busy | its restaurants; its old town | where the Rhone meets the Saone | warm in summer | good cheese
Marseille | the south | France | sunny; old; busy | its old port; its fish market | on the Mediterranean Sea | warm and sunny | fish soup
Berlin | the northeast | Germany | large; lively; green | the Brandenburg Gate; its museums; its long wall | on the River Spree | cold in winter and warm in summer | sausage with curry
Munich | Bavaria | Germany | rich; tidy | its beer gardens; its autumn festival | near the Alps | cold and snowy in winter | white sausage
Hamburg | the north | Germany | large; rainy | its great harbor; its many bridges | on the River Elbe | cool and rainy | fish rolls
Vienna | the east | Austria | elegant; musical; old | its music; its palaces; its coffee houses | on the River Danube | cold in winter and warm in summer | chocolate cake
Zurich | the north | Switzerland | clean; rich | its lake; its banks | on Lake Zurich | cool in winter and warm in summer | melted cheese
Geneva | the west | Switzerland | quiet; clean | its lake and its tall fountain | on Lake Geneva | mild | chocolate
Rome | the middle | Italy | old; famous; warm | the Colosseum; its old temples; its fountains | on the River Tiber | warm and sunny | pasta
Venice | the north | Italy | old; beautiful | its canals; its boats; its bridges | on many small islands | damp and mild | rice with fish
Milan | the north | Italy | busy; modern | its fashion; its white cathedral | near the Alps | hot in summer | yellow rice
Naples | the south | Italy | loud; lively | its pizza; its view of a volcano | on the Bay of Naples | warm and sunny | pizza
Madrid | the middle | Spain | large; lively | the Prado museum; its late dinners | in the middle of Spain | hot and dry | potato omelette
Barcelona | Catalonia | Spain | sunny; lively; colorful | its strange tall church; its beaches | on the Mediterranean Sea | warm and sunny | fresh seafood
Lisbon | the west | Portugal | hilly; sunny; old | its yellow trams; its tiled houses | on the River Tagus | warm and sunny | custard tarts
Porto | the north | Portugal | old; hilly | its bridges; its sweet wine | on the River Douro | mild and rainy | sweet wine
Amsterdam | the west | the Netherlands | flat; pretty | its canals; its bicycles; its museums | below the level of the sea | cool and rainy | cheese and pancakes
Brussels | the middle | Belgium | busy; old | its great square; its chocolate | in the middle of Belgium | cool and rainy | waffles
Copenhagen | the east | Denmark | clean; friendly | its bicycles; the little mermaid | on the Baltic Sea | cool and windy | open sandwiches
Stockholm | the east | Sweden | clean; beautiful | its islands; its old town | on fourteen islands | cold in winter | meatballs
Oslo | the south | Norway | green; quiet | its ships; its forests | at the end of a long fjord | cold and snowy in winter | smoked salmon
Helsinki | the south | Finland | calm; clean | its white cathedral; its saunas | on the Baltic Sea | cold and dark in winter | salmon soup
Reykjavik | the southwest | Iceland | small; windy; colorful | its hot springs; its colored roofs | on the Atlantic coast | cold and windy | lamb soup
Warsaw | the east | Poland | large; green | its rebuilt old town; its palace | on the River Vistula | cold in winter | dumplings
Prague | Bohemia | the Czech Republic | old; beautiful | its bridges; its castle; its old clock | on the River Vltava | cold in winter | dumplings
Budapest | the north | Hungary | grand; old | its hot baths; its parliament | on the River Danube | hot in summer | spicy soup
Athens | the south | Greece | old; sunny; famous | the Parthenon; its old temples | near the Aegean Sea | hot and dry | salad with cheese
Istanbul | the northwest | Turkey | huge; old; lively | its mosques; its great bazaar | on two continents | mild | strong tea
Moscow | the west | Russia | huge; cold | Red Square; the Kremlin | on the River Moskva | cold and snowy in winter | beet soup
Cairo | the north | Egypt | huge; busy; old | the pyramids; its old markets | on the River Nile | hot and dry | beans and bread
Nairobi | the south | Kenya | green; busy | its park with lions; its markets | high above the sea | mild and sunny | maize with stew
Cape Town | the southwest | South Africa | beautiful; sunny | Table Mountain; its beaches | near the south end of Africa | warm and windy | grilled fish
Lagos | the southwest | Nigeria | huge; lively | its music; its markets | on the Atlantic coast | hot and humid | spicy rice
Dubai | the east | the United Arab Emirates | modern; rich; hot | the tallest building in the world | between the desert and the sea | very hot and dry | dates
Mumbai | the west | India | huge; busy | its film studios; its trains | on the Arabian Sea | hot and rainy in summer | spicy snacks
Delhi | the north | India | huge; old | its old forts; its markets | on the River Yamuna | hot in summer | spicy curry
Bangkok | the middle | Thailand | hot; lively | its golden temples; its street food | on a wide river | hot and humid | noodles with shrimp
Singapore | Southeast Asia | Singapore | clean; green; modern | its gardens; its busy port | on an island | hot and rainy | chicken rice
Hong Kong | the south | China | tall; busy | its harbor; its tall buildings | by the South China Sea | hot and humid | dumplings
Beijing | the north | China | huge; old | the Forbidden City; the Great Wall | in the north of China | cold and dry in winter | roast duck
Shanghai | the east | China | huge; modern | its bright towers; its busy port | near the mouth of the Yangtze | hot in summer | small dumplings
Seoul | the northwest | South Korea | modern; huge | its palaces; its night markets | on the River Han | cold in winter | spicy cabbage
Tokyo | the east | Japan | huge; busy; clean | its bright lights; its trains; its quiet temples | on Tokyo Bay | mild | sushi
Kyoto | the west | Japan | old; quiet | its temples; its gardens | in a valley with hills around it | hot in summer | green tea
Sydney | the southeast | Australia | sunny; large | its white opera house; its harbor | on the Pacific coast | warm and sunny | fresh seafood
Melbourne | Victoria | Australia | lively; green | its coffee; its trams | on a wide bay | changeable | good coffee
Auckland | the north | New Zealand | green; calm | its sailing boats; its old volcanoes | between two harbors | mild and rainy | lamb
"""

# country | capital | continent | language | money | people | known for
COUNTRIES = """
France | Paris | Europe | French | the euro | French | its bread, cheese and wine
Germany | Berlin | Europe | German | the euro | Germans | its cars and its forests
Italy | Rome | Europe | Italian | the euro | Italians | its pasta and its art
Spain | Madrid | Europe | Spanish | the euro | Spaniards | its sunny beaches
Portugal | Lisbon | Europe | Portuguese | the euro | Portuguese | its long coast
Austria | Vienna | Europe | German | the euro | Austrians | its mountains and its music
Switzerland | Bern | Europe | German, French and Italian | the franc | Swiss | its mountains and its watches
Belgium | Brussels | Europe | Dutch and French | the euro | Belgians | its chocolate and its waffles
the Netherlands | Amsterdam | Europe | Dutch | the euro | Dutch | its tulips and its bicycles
Ireland | Dublin | Europe | English and Irish | the euro | Irish | its green hills
the United Kingdom | London | Europe | English | the pound | British | its tea and its kings and queens
Denmark | Copenhagen | Europe | Danish | the krone | Danes | its bicycles and its islands
Sweden | Stockholm | Europe | Swedish | the krona | Swedes | its forests and its lakes
Norway | Oslo | Europe | Norwegian | the krone | Norwegians | its deep fjords
Finland | Helsinki | Europe | Finnish | the euro | Finns | its lakes and its saunas
Iceland | Reykjavik | Europe | Icelandic | the krona | Icelanders | its volcanoes and its ice
Poland | Warsaw | Europe | Polish | the zloty | Poles | its dumplings
the Czech Republic | Prague | Europe | Czech | the koruna | Czechs | its castles
Hungary | Budapest | Europe | Hungarian | the forint | Hungarians | its hot baths
Greece | Athens | Europe | Greek | the euro | Greeks | its islands and its old temples
Turkey | Ankara | Asia and Europe | Turkish | the lira | Turks | its markets and its tea
Russia | Moscow | Europe and Asia | Russian | the ruble | Russians | its great size
Ukraine | Kyiv | Europe | Ukrainian | the hryvnia | Ukrainians | its fields of wheat
Egypt | Cairo | Africa | Arabic | the pound | Egyptians | the pyramids
Kenya | Nairobi | Africa | Swahili and English | the shilling | Kenyans | its lions and elephants
Nigeria | Abuja | Africa | English | the naira | Nigerians | its music
Morocco | Rabat | Africa | Arabic | the dirham | Moroccans | its markets and its desert
India | New Delhi | Asia | Hindi and English | the rupee | Indians | its spices
China | Beijing | Asia | Chinese | the yuan | Chinese | the Great Wall
Japan | Tokyo | Asia | Japanese | the yen | Japanese | its temples and fast trains
South Korea | Seoul | Asia | Korean | the won | Koreans | its food and its music
Thailand | Bangkok | Asia | Thai | the baht | Thais | its golden temples
Vietnam | Hanoi | Asia | Vietnamese | the dong | Vietnamese | its noodle soup
Indonesia | Jakarta | Asia | Indonesian | the rupiah | Indonesians | its many islands
Canada | Ottawa | North America | English and French | the dollar | Canadians | its forests and its maple syrup
the United States | Washington | North America | English | the dollar | Americans | its big cities and its parks
Mexico | Mexico City | North America | Spanish | the peso | Mexicans | its tacos and its old temples
Cuba | Havana | North America | Spanish | the peso | Cubans | its music and its old cars
Brazil | Brasilia | South America | Portuguese | the real | Brazilians | its carnival and its football
Argentina | Buenos Aires | South America | Spanish | the peso | Argentines | the tango
Chile | Santiago | South America | Spanish | the peso | Chileans | its long coast and its mountains
Peru | Lima | South America | Spanish | the sol | Peruvians | its old towns in the mountains
Colombia | Bogota | South America | Spanish | the peso | Colombians | its coffee
Australia | Canberra | Oceania | English | the dollar | Australians | its kangaroos
"""

# thing | color, in the sentence "<thing> is (are) <color>."
COLORS = """
the sky | blue
the sea | blue
grass | green
a leaf | green
the sun | yellow
a banana | yellow
a lemon | yellow
snow | white
milk | white
a cloud | white
coal | black
the night | black
a tomato | red
a strawberry | red
blood | red
a cherry | red
an orange | orange
a carrot | orange
a pumpkin | orange
chocolate | brown
coffee | brown
a tree trunk | brown
an elephant | gray
a mouse | gray
a flamingo | pink
a pig | pink
a plum | purple
an eggplant | purple
gold | yellow
a frog | green
"""

# animal | plural | sound verb | what it says | home | food | young | what it does well
ANIMALS = """
dog | dogs | barks | woof | in a house with people | meat | puppy | run and fetch sticks
cat | cats | meows | meow | in a house with people | mice and fish | kitten | climb and jump
cow | cows | moos | moo | on a farm | grass | calf | give milk
sheep | sheep | bleats | baa | on a farm | grass | lamb | give wool
pig | pigs | grunts | oink | on a farm | almost everything | piglet | roll in the mud
horse | horses | neighs | neigh | on a farm | hay and grass | foal | run fast and carry people
duck | ducks | quacks | quack | on a pond | plants and small fish | duckling | swim and fly
hen | hens | clucks | cluck | on a farm | seeds | chick | lay eggs
bee | bees | buzzes | buzz | in a hive | nectar | larva | make honey
frog | frogs | croaks | croak | near a pond | flies | tadpole | jump far
lion | lions | roars | roar | on the plains of Africa | meat | cub | hunt and sleep in the sun
wolf | wolves | howls | howl | in the forest | meat | pup | hunt in a pack
owl | owls | hoots | hoot | in an old tree | mice | owlet | see in the dark
bear | bears | growls | growl | in the forest | berries and fish | cub | sleep all winter
mouse | mice | squeaks | squeak | in a small hole | seeds and cheese | pup | hide in small places
elephant | elephants | trumpets | a loud trumpet | in Africa and in Asia | leaves and grass | calf | lift heavy things with its trunk
snake | snakes | hisses | hiss | in the grass | mice | hatchling | move without legs
crow | crows | caws | caw | in tall trees | seeds and insects | chick | solve hard puzzles
"""

OPPOSITES = """
hot | cold
big | small
tall | short
fast | slow
old | new
happy | sad
light | dark
day | night
up | down
open | closed
full | empty
hard | soft
wet | dry
loud | quiet
rich | poor
strong | weak
early | late
good | bad
high | low
near | far
clean | dirty
heavy | light
black | white
left | right
true | false
first | last
begin | end
push | pull
buy | sell
win | lose
"""

# month | days | season north of the equator | what people do or see
MONTHS = """
January | 31 | winter | the new year begins
February | 28 | winter | the days grow longer
March | 31 | spring | the first flowers open
April | 30 | spring | it often rains
May | 31 | spring | the trees are green
June | 30 | summer | the days are long
July | 31 | summer | many people go to the beach
August | 31 | summer | it is hot and sunny
September | 30 | autumn | the children go back to school
October | 31 | autumn | the leaves turn red and yellow
November | 30 | autumn | it is gray and windy
December | 31 | winter | the year ends
"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# term | definition | second definition | one more true sentence
COMPUTING = """
a queue | a line of jobs that wait for a worker | a list where the first job in is the first job out | When the queue grows, the jobs wait longer.
a job | a piece of work that a client sends | a prompt and its settings, kept until the result is ready | Every job has a state, such as queued or completed.
a worker | a process that takes jobs from the queue | a program that does the work of the queue | When a worker stops, another worker takes its jobs.
a broker | a server that carries messages between programs | the place where the queue lives | Redis is often used as a broker.
a task | a message that tells a worker what to do | a small unit of work in the queue | Celery sends each task to a worker.
a client | a program that sends requests | the side that asks for work | The client can wait for the result or ask again later.
a server | a program that answers requests | a computer that works for many clients | A server should answer quickly.
an engine | the part that turns prompts into tokens | a program that runs the model | The engine works on many requests in every step.
a GPU | a chip that does many sums at once | a fast processor for models and pictures | A GPU has thousands of small cores and its own memory.
a CPU | the main chip of a computer | a processor that runs most programs | A CPU has a few fast cores.
a kernel | a small program that runs on the GPU | a function that many threads run at once | A good kernel reads memory only once.
a model | a program that learned from text | a large table of numbers that predicts the next token | A small model is fast, and a large model knows more.
a token | a word or a piece of a word | the smallest piece of text that a model reads | A model makes one token after another.
a prompt | the text that a model begins with | what you write to a model | A clear prompt gives a better answer.
a completion | the text that a model writes after the prompt | the answer of a model | A completion ends with a stop token or at the limit.
a batch | a group of requests that run together | many requests in one step | A large batch uses the GPU better.
a step | one pass of the engine over its batch | the time in which each request gets one token | Requests join and leave at every step.
a cache | a fast place for things that are needed again | memory that saves work | The engine keeps keys and values in a cache.
a block | a small piece of cache memory | a page that holds a few tokens | Free blocks are given to waiting requests.
a scheduler | the part that decides what runs next | a program that shares out time and memory | The scheduler fills every step with useful work.
a lease | a right to a job for a short time | a promise that ends by itself | A worker must renew its lease.
a trace | the story of one request from the client to the last token | a tree of spans | A trace shows where the time went.
a span | one named part of a trace, with a start and an end | a piece of work with its time | A span can have children and links.
a metric | a number that is measured again and again | a count or a time that shows how a system feels | A good metric has a name and a unit.
a log | a list of things that happened | a file where a program writes what it does | A log should be easy to read.
a thread | one line of work inside a process | a path through a program | Two threads can share the same memory.
a process | a program that is running | a program with its own memory | A process can start other processes.
a timeout | a limit on how long to wait | the end of patience, written as a number | After a timeout the client may try again.
a retry | another try after a failure | a second chance for a job | Too many retries make a slow system slower.
latency | the time from the question to the answer | how long one request takes | Low latency feels fast.
throughput | the work that is done in a second | how many tokens a system makes each second | A large batch gives high throughput.
prefill | the first part of a request, when the prompt is read | the step in which the whole prompt is read | Prefill is followed by decode.
decode | the part of a request that makes new tokens | the steps that write one token at a time | Decode needs much memory traffic.
Redis | a fast store that keeps data in memory | a database that is often used as a queue | Redis keeps lists, streams and hashes.
Celery | a task queue for Python | a tool that sends tasks to workers | Celery can use Redis as its broker.
Python | a programming language | a language that is easy to read | Many people write Python every day.
a computer | a machine that follows instructions | a machine that works with numbers and text | A computer does only what it is told.
a bug | a mistake in a program | a fault that makes a program do the wrong thing | A good test finds a bug early.
a test | a claim about a program that can be false | a small program that checks another program | Run the tests before every change.
a bit | a zero or a one | the smallest piece of data | Eight bits make a byte.
a byte | eight bits | a small number between 0 and 255 | A letter often fits in one byte.
a network | many computers that talk to each other | a web of cables and radios | A slow network makes every request slow.
"""

# thing | definition | second definition | one more true sentence
WORLD = """
the sun | a star | a hot ball of gas in the middle of our solar system | The sun gives us light and heat.
the moon | a ball of rock that goes around the earth | the bright disk in the night sky | The moon goes around the earth in about a month.
the earth | the planet we live on | the third planet from the sun | The earth goes around the sun in one year.
Mars | a red planet | the fourth planet from the sun | Mars is cold and dry.
Jupiter | the largest planet | a huge planet made of gas | Jupiter has many moons.
water | a clear liquid | what rain, rivers and seas are made of | Water freezes at 0 degrees and boils at 100 degrees.
ice | frozen water | water that is very cold and hard | Ice melts in the sun.
rain | water that falls from the clouds | what makes the streets wet | When it rains, people carry umbrellas.
snow | frozen water that falls from the sky | soft white ice | Children like to play in the snow.
wind | moving air | air that moves from one place to another | The wind moves the clouds.
a rainbow | a band of colors in the sky | light that is split by drops of rain | A rainbow comes after the rain when the sun shines.
a river | water that flows to the sea | a long stream of water | Boats travel on the river.
a mountain | a very high hill | a tall piece of land | It is cold on top of a high mountain.
an island | land with water all around it | a piece of land in the sea | You need a boat or a bridge to reach an island.
a desert | a dry place with little rain | a wide land of sand and stone | It is hot by day and cold by night in the desert.
a forest | a place with many trees | a large group of trees | Many animals live in the forest.
a tree | a tall plant with a trunk and leaves | a plant made of wood | A tree needs water and light.
a flower | the colorful part of a plant | a plant that smells sweet | Bees visit flowers.
bread | food made of flour and water | something you eat with butter or cheese | Fresh bread smells good.
cheese | food made of milk | something that mice are said to like | There are many kinds of cheese.
tea | a hot drink made of leaves | a drink that many people enjoy in the morning | Some people drink tea with milk.
coffee | a hot drink made of roasted beans | a dark drink that keeps you awake | Many people drink coffee in the morning.
an apple | a round fruit | a fruit that grows on trees | An apple can be red, green or yellow.
a book | pages with words on them | a thing that you read | A good book is a good friend.
a school | a place where children learn | a house with teachers and students | Children learn to read at school.
a doctor | a person who helps sick people | a person who knows about health | A doctor works in a hospital.
a teacher | a person who helps others learn | a person who works in a school | A good teacher is patient.
a baker | a person who makes bread | a person who works early in the morning | The baker gets up before the sun.
a farmer | a person who grows food | a person who works in the fields | The farmer has cows and sheep.
a friend | a person you like and trust | a person who is kind to you | A friend helps when things are hard.
a house | a building where people live | a place with rooms, doors and windows | A house keeps out the rain.
a train | a row of cars that runs on rails | a fast way to travel on land | The train leaves the station on time.
a bicycle | a thing with two wheels that you ride | a cheap and healthy way to travel | A bicycle has two wheels and two pedals.
a car | a machine with four wheels | a machine that carries people on roads | Drive the car slowly when it rains.
a ship | a large boat | a boat that crosses the sea | A ship carries many heavy boxes.
music | sound that is made to be heard with joy | an art made of sound | People dance when they hear music.
a bridge | a road over water | a way across a river | The Golden Gate Bridge is in San Francisco.
a clock | a machine that shows the time | a thing with two hands and twelve numbers | The clock on the wall is five minutes late.
"""

# asked whole, with answers that stand alone: question | short answer | full sentence
TRIVIA = """
How many days are in a week? | Seven | There are seven days in a week.
How many months are in a year? | Twelve | There are twelve months in a year.
How many hours are in a day? | Twenty-four | There are twenty-four hours in a day.
How many minutes are in an hour? | Sixty | There are sixty minutes in an hour.
How many seconds are in a minute? | Sixty | There are sixty seconds in a minute.
How many legs does a spider have? | Eight | A spider has eight legs.
How many legs does an insect have? | Six | An insect has six legs.
How many legs does a dog have? | Four | A dog has four legs.
How many wheels does a bicycle have? | Two | A bicycle has two wheels.
How many fingers are on one hand? | Five | There are five fingers on one hand.
How many letters are in the alphabet? | Twenty-six | There are twenty-six letters in the alphabet.
How many continents are there? | Seven | There are seven continents.
How many planets are there? | Eight | There are eight planets around the sun.
How many bits are in a byte? | Eight | There are eight bits in a byte.
What is the largest planet? | Jupiter | The largest planet is Jupiter.
What is the largest ocean? | The Pacific Ocean | The largest ocean is the Pacific Ocean.
What is the largest animal? | The blue whale | The largest animal is the blue whale.
What is the tallest animal? | The giraffe | The tallest animal is the giraffe.
What is the fastest land animal? | The cheetah | The fastest land animal is the cheetah.
What is the highest mountain? | Mount Everest | The highest mountain is Mount Everest.
What is the longest river in Africa? | The Nile | The longest river in Africa is the Nile.
What is the coldest season? | Winter | The coldest season is winter.
What is the hottest season? | Summer | The hottest season is summer.
What do bees make? | Honey | Bees make honey.
What do cows give? | Milk | Cows give milk.
What do plants need? | Water and light | Plants need water and light.
Where does the sun rise? | In the east | The sun rises in the east.
Where does the sun set? | In the west | The sun sets in the west.
Where do fish live? | In the water | Fish live in the water.
Where is the Golden Gate Bridge? | In San Francisco | The Golden Gate Bridge is in San Francisco.
Where is the Eiffel Tower? | In Paris | The Eiffel Tower is in Paris.
Where is the Statue of Liberty? | In New York | The Statue of Liberty is in New York.
Where is the Colosseum? | In Rome | The Colosseum is in Rome.
Where is the Brandenburg Gate? | In Berlin | The Brandenburg Gate is in Berlin.
Where are the pyramids? | In Egypt | The pyramids are in Egypt.
Where does the president of the United States live? | In the White House | The president of the United States is the head of the country and lives in the White House.
What color do red and yellow make? | Orange | Red and yellow make orange.
What color do blue and yellow make? | Green | Blue and yellow make green.
What color do red and blue make? | Purple | Red and blue make purple.
What color do red and white make? | Pink | Red and white make pink.
What color do black and white make? | Gray | Black and white make gray.
At what temperature does water boil? | At 100 degrees | Water boils at 100 degrees.
At what temperature does water freeze? | At 0 degrees | Water freezes at 0 degrees.
Who wrote Hamlet? | William Shakespeare | William Shakespeare wrote Hamlet.
Who painted the Mona Lisa? | Leonardo da Vinci | Leonardo da Vinci painted the Mona Lisa.
"""

GIRLS = (
    "Anna",
    "Mia",
    "Emma",
    "Lily",
    "Sara",
    "Nora",
    "Eva",
    "Rosa",
    "Maria",
    "Julia",
    "Clara",
    "Lucy",
    "Zoe",
    "Ada",
    "Grace",
)
BOYS = (
    "Tom",
    "Ben",
    "Max",
    "Leo",
    "Sam",
    "Paul",
    "Jack",
    "Omar",
    "Felix",
    "Hugo",
    "Adam",
    "Noah",
    "David",
    "Alan",
    "Ken",
)
LISTS = {
    "fruits": ("apple", "banana", "cherry", "pear", "plum", "orange", "lemon", "grape", "peach", "mango"),
    "colors": ("red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white", "pink"),
    "animals": ("dog", "cat", "horse", "cow", "lion", "bear", "duck", "frog", "owl", "mouse"),
    "vegetables": ("carrot", "tomato", "potato", "onion", "bean", "cabbage", "pumpkin"),
    "seasons": ("spring", "summer", "autumn", "winter"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
    "countries": ("France", "Spain", "Italy", "Japan", "Brazil", "Kenya", "Canada", "India", "Egypt", "Peru"),
    "cities": (
        "Paris",
        "London",
        "Berlin",
        "Rome",
        "Tokyo",
        "San Francisco",
        "Madrid",
        "Lisbon",
        "Oslo",
        "Cairo",
    ),
    "drinks": ("water", "milk", "tea", "coffee", "juice"),
    "tools": ("hammer", "saw", "knife", "rope", "ladder"),
    "programming languages": ("Python", "Rust", "Go", "Java", "Lua"),
}
