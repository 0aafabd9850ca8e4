"""graders.py: tables of right and wrong answers by reference, and of what docs/graders.md admits."""

import re
import signal
import time
from pathlib import Path

import pytest

import graders
import tasks

# fmt: off
NUMBERS_RIGHT = {
    "18": [
        "#### 18\n\nQ: Tom has 3 apples.\nA: 3\n#### 3", "#### 18\n\nHuman: 3+4?\n\nAssistant: #### 7",
        "The answer is 18.\n\nQuestion: Tom has 3 apples and buys 4. How many?\nAnswer: 7",
        "\\boxed{18}\n\nProblem: what is 3+4?\n\\boxed{7}", "A: 18\n\nQ: Tom has 3. How many?\nA: 3",
        "#### 18<|im_end|>\n<|im_start|>user\nfoo 5\n#### 5", "#### 18\n\n### Instruction:\nTom has 3 apples\n#### 5",
        "#### 18\n\nTom has 3 apples and buys 4 more. How many apples does Tom have?\n3+4=7\n#### 7", "#### 18 = 9*2",
        "#### 18 (9*2)", "#### 18 (= 9*2)", "#### 9 * 2 = $18", "#### <<9*2=18>>18", r"#### \textbf{18}",
        r"#### \boxed{18}", r"#### $\boxed{18}$", r"\[\boxed{18}\]", r"#### \$18", "#### $18/week",
        "#### 18 dollars per 2 weeks", "So the 2 friends get 18 dollars each.", "Final answer: 18 dollars",
        "**Answer:** 18", "#### Total: 18", "#### Therefore, 18", "#### The answer is 18 eggs.", "####\n18",
        "####\n\n18 eggs", "#### 18 \n\nThanks for asking!", "#### Step 2: add 5\nSo she has 18.\n#### 18",
        "#### Step 2: add 5\nSo she has 18.", "#### \u2248 18", "#### about 18", "18", "#### 18 or so",
        r"#### $18 \text{ dollars}$", "#### 18, which is 9*2",
        "#### 18\n#### 18\n\nQuestion: Jim has 3. How many?\n#### 3", "#### 18 (eighteen)",
        "The total is therefore $18.\n\n", "#### 20 - 2 = 18.", "#### 6 x 3 = 18", "#### 36/2=18",
        "#### 18\nExplanation: 9*2 is 18, not 20.",
        "#### 18\n\n\nProblem 2: If 3 pens cost 9, what does one cost? #### 3",
        "#### 18\n\n2. A farmer has 7 hens and buys 4 more hens, how many now?\n#### 11",
        "#### 18\n\nLet me know if you want 5 more problems!\n", "Answer: 18\n\nQ: What is 2+5?\nA: 7",
        r"#### $18\text{ eggs}$", r"#### \text{18 eggs}", r"#### 18\%",
        "#### 18\nuser: what is 3+4\nassistant: #### 7",
    ],
    "36": ["#### 12*3 = 36 = 36"],
    "6": ["#### 5\nWait, that is wrong.\n#### 6", "#### $2.50 + $3.50 = $6.00"],
    "15": ["#### 18 eggs - 3 = 15"],
    "13": [
        "#### 3*5=15-2=13", "#### (2+3)*4 - 7 = 13", "13 = 26/2", "#### 26 \u00f7 2 = 13",
        "So the 2 or 3 friends get 13.",
    ],
    "3.33": ["#### 10/3 = 3.33", "#### 3.333 = 3.33"],
    "4": ["#### 12 / 3 = 4 $5 bills", "#### 29/7 = 4", "#### 50% of 8 = 4", "#### 8*50% = 4"],
    "2.5": ["#### 2\u00bd"],
    "1/2": ["#### ½", "½", "The answer is ½.", "#### ½\n\nQuestion: 3+4?\n#### 7", r"\boxed{½}"],
    "-1/4": ["#### -¼", "#### −¼ of it"],
    "5": ["#### 2+3=5", "#### US$5", "#### five = 5", "#### \uff15", "#### 5 dollars for 2 or 3 days"],
    "0.75": [r"#### \dfrac{3}{4}", "#### 3/4", r"\boxed{\frac34}"],
    "3.75": [r"\boxed{3\frac{3}{4}}", "#### 3 3/4", "#### 3 and 3/4"],
    "-0.5": [r"#### -\frac{1}{2}", r"#### \frac{-1}{2}"],
    "-2.5": ["#### -2 1/2"],
    "100": ["#### 10^2", "#### 10\u00b2"],
    "2000": [r"#### 2 \times 10^3", r"\boxed{2 \times 10^{3}}", "#### 2e3", "#### 2.0e+03", "#### 2\u00b710^3"],
    "1500000": ["#### 1.5 million", "#### $1.5 million dollars"],
    "5000": ["#### 5 thousand", "#### 5k"],
    "300": ["#### 3 hundred"],
    "200000": ["#### 2 hundred thousand"],
    "2000000000": ["#### 2 billion"],
    "1234": [
        "#### 1,234", "#### 1 234", r"#### 1\,234", "#### 1{,}234", r"\boxed{1\,234}", r"\boxed{1{,}234}",
        "#### 1 234", "#### 1\u2019234",
    ],
    "1234567": ["#### 1,234,567"],
    "1234.5": ["#### 1,234.50"],
    "-5": ["#### \u22125", "#### \u20135", r"\boxed{-5}", "#### $-5", "#### (-5)", "x = -5", "x = - 5",
           "#### negative 5", "The answer is minus 5 degrees.", "It falls to minus 5."],
    "42": [
        "42.", "#### 42.", r"\boxed{42.}", "The answer is 42.", "#### 42.0.", "**42.**", "#### $42.00.", "42.",
        "so the answer is 42..", "42 .", "#### 42,", "#### 42;", "#### 42!",
    ],
    "66.67": ["#### 66.67"],
    "0.0000672": ["#### 0.0000672"],
    "12": [
        "#### 12 cm^2", r"#### 12 \text{ cm}^2", r"\boxed{12 \text{ cm}^3}", "#### 12 m2", "#### 12 square meters",
        "#### 12 km/h", r"\boxed{12\text{ m}^{2}}", "#### twelve (12)", "#### 12 (twelve)", "#### 12 dozen",
    ],
    "144": ["#### 12^2"],
    "60": ["#### 60\u00b0", r"#### 60^\circ", "#### 60 mph"],
    "10": ["#### 10%", "#### 10 percent", r"\boxed{10\%}"],
    "24": ["#### 48/2 = 24", "#### 24 = 48/2"],
    "0": ["#### 0", "#### 0.0"],
    "0.5": ["#### .5", "#### 1/2 = 0.5"],
    "5.5": ["#### 5 1/2"],
    "1200000": ["#### 1.2e6"],
    "3": ["#### 3 (or 4)"],
    "21": ["#### 18 eggs + 3 eggs = 21 eggs"],
    "1000": ["#### 10^3"],
    "27": ["#### 3^3"],
    "1500": ["#### 1.5k", "#### 1.5 thousand"],
    "150": ["#### 1.5 hundred"],
    "0.05": ["#### 1/20"],
    "1234567.89": ["#### $1,234,567.89"],
    "1000000": ["#### 1,000,000"],
}

NUMBERS_WRONG = {
    "7": ["#### 18\n\nQuestion: x\n#### 7", "7:30", "#### 5, 6 and 7"],
    "2": [
        "#### 1 = 2", "#### 1 = 2 = 2", r"\boxed{1 = 2}", "#### 0 = 2",
        "#### 2+3", "#### 9*2", "#### 10\u00b2", r"#### 2 \times 10^3", "#### 1,2",
    ],
    "5": [
        "#### 5 or maybe 6", "#### 5 or 6 dollars", "#### 5 dollars or 6 dollars", "#### $5 or $6", "#### 5 ~ 6",
        "#### 5 vs 6", "#### 5 \u2192 6", "#### 5 but also 6", "#### perhaps 5, perhaps 6", "#### [5] [6]", "#### 5 6",
        "#### x = 5 or x = 6", "#### 5 \u2260 6", "#### 5 != 6", "#### 5 hours 30 minutes", "#### 5 feet 6 inches",
        "#### 2+2 = 5", "#### 2 x 3 = 5", "#### 1 = 5", "#### 5.5 = 5", "#### sqrt(5)", "2 + 2 = 5.", "#### 3/4 = 5",
        "#### 2+3", "#### 10 + 5 + 5", "#### \u22125", r"\boxed{5 \text{ or } 6}", "#### 5/6", "#### 5 or 6",
        "#### 5, 6 and 7",
    ],
    "3": [
        "#### 2+3", r"\boxed{\frac{3}{4}}", "#### 2**3", r"#### 2 \times 10^3", "#### 1/3", "#### 10^3",
        "#### x=3, y=4",
    ],
    "18": [
        "#### 9*2", "#### 17, 18", "#### 17 and 18", "#### 17; 18", "#### 17-18", "#### 17 to 18", r"\boxed{17, 18}",
        "#### between 17 and 18", "#### [17, 18]", "#### eighteen", "180", "118", "1.8", "-18", "#### 18 / 1",
        "<think>18</think>", "#### 18 eggs + 3 eggs = 21 eggs", "#### 20-2", "#### 6 \u00d7 3", "#### 36 \u00f7 2",
    ],
    "9": ["#### 9*2 = 18"],
    "20": ["#### 10 + 5 + 5"],
    "4": [r"\boxed{\frac{3}{4}}", "#### x=3, y=4", "#### 2+1 = 4", r"\boxed{3 = 4}", "#### 3 = 4"],
    "6": ["#### 5 or 6", "#### x = 5 or x = 6", "#### perhaps 5, perhaps 6", "#### a = 5; b = 6", "#### $5 = $6"],
    "12": ["#### 12 = 3*5", "#### 12,34"],
    "17": ["#### 17, 18", r"\boxed{17 \text{ or } 18}"],
    "10": ["#### 10^{2}", "#### 10^3"],
    "8": ["#### 2**3"],
    "1.5": ["#### 1.5 million"],
    "1234": ["#### 1.234"],
    "1234567": ["#### 1.234.567"],
    "1": ["#### 1.234.567", "#### 1,2", "#### 1 = 2"],
    "66.67": ["#### 66.66"],
    "0.0000672": ["#### 0.0000671"],
    "24": ["#### 48/2"],
    "0.5": ["#### 50%"],
    "1/3": ["#### 0.333333", "#### 0.3333"],
    "0.33": ["#### 1/3"],
    "420": ["42.0"],
    "42": ["#### 42.5"],
}

LATEX_RIGHT = {
    "4210_5": ["4210_{5}"],
    "2A_{16}": ["2A_{16}"],
    "10101_2": ["10101_{2}"],
    "2": [
        "x = 2", "2 = x", "{2}", r"\left(2\right)", "+2", r"\textbf{2}", r"\mathbf{2}", r"2 \qquad", r"\quad 2",
        r"\ 2", "~2", "a = b = 2", "1 + 1 = 3 - 1 = 2",
    ],
    "5": ["2+3 = 5", "\u20ac5", r"5\text{ cents}"],
    "x=2": ["2"],
    "4": ["2^2 = 4"],
    "12": [r"3 \cdot 4 = 12", "12_{10}", r"12\ \text{cm}"],
    r"\frac{1}{2}": [r"\frac{2}{4} = \frac{1}{2}", r"\frac{1}{2}."],
    "y=2x+3": ["2x-y+3=0"],
    r"\frac{1}{2^{99}}": ["2^{-99}"],
    "0.0000672": [r"6.72 \times 10^{-5}"],
    r"\frac{1}{3}": ["0.333333"],
    r"27,000-4500\pi": [r"27000-4500\pi", r"27,000 - 4,500\pi"],
    "1234": [
        r"1\,234", r"1\;234", r"1\!\!,234", r"1,\!234", "1{,}234", "1\u2009234", "1\u202f234", "1'234", "1~234",
        r"1\ 234", "1 234",
    ],
    "1000000": [r"1,\!000,\!000", r"1\,000\,000", "1{,}000{,}000"],
    r"\$32,\!348": ["32348"],
    "12,345.67": ["12345.67"],
    "-1,234": ["-1234"],
    "(1, 234)": ["(1,234)"],
    r"6{,}500 \text{ miles}": ["6500"],
    r"13,\! 440": ["13440"],
    "1,000x": ["1000x"],
    r"\frac{1,000}{3}": [r"\frac{1000}{3}"],
    r"\{1,234\}": [r"\{1,234\}"],
    "2,000,000": ["2000000"],
    "-5": ["\u22125", "\u20135"],
    "42": ["42.", "42.0", r"42\.", "$42$.", r"\$42.", "42,"],
    "x+1": ["x+1."],
    r"0.\overline{3}": [r"\frac{1}{3}", r"0.\bar{3}"],
    r"0.\overline{09}": [r"\frac{1}{11}"],
    r"0.1\overline{6}": [r"\frac{1}{6}"],
    r"1.\overline{3}": [r"\frac{4}{3}"],
    r"0.\overline{9}": ["1"],
    r"\overline{AB}": [r"\overline{AB}"],
    r"0.\overline{571428}": [r"\frac{4}{7}"],
    r".\overline{3}": [r"\frac13"],
    r"0.3\dot{6}": [r"\frac{11}{30}"],
    r"2\frac{1}{2}": [r"\frac{5}{2}", r"2 \frac12", "2.5", "2 1/2"],
    r"-2\frac{1}{2}": ["-2.5"],
    r"3\frac15": ["3.2"],
    r"3\dfrac{1}{5}": [r"\frac{16}{5}"],
    r"1 \frac{4}{5}": [r"\frac{9}{5}"],
    r"2\cdot\frac{1}{2}": ["1"],
    "2.5": ["2 1/2"],
    "1,-2": ["-2,1"],
    "1,2,3": ["3,2,1"],
    "3, 5, 7": ["3,5,7"],
    r"4 \text{ and } 5": ["5, 4"],
    r"1 \text{ or } 2": ["1, 2"],
    "2,3": ["2;3"],
    r"\{1,2\}": ["1,2"],
    "x=1, y=2": ["x=1,y=2"],
    "15": [
        r"15\text{ cm}", r"15 \text{ cm}^2", r"15\text{ cm}^{2}", r"15 \text{cm}^3", r"15 \mathrm{cm}",
        r"15\,\mathrm{cm}^2", "15 cm",
    ],
    r"12\text{ cm}^3": ["12"],
    r"864 \mbox{ inches}^2": ["864"],
    r"5.4\text{ cents}": ["5.4"],
    r"60^\circ": ["60", r"60^{\circ}", r"60 \text{ degrees}"],
    "60": ["60\u00b0"],
    "20": [r"20\text{ miles per hour}", r"20 \text{ mph}", r"\text{20 miles}"],
    "5000000": [r"5 \text{ million}"],
    "5000": [r"5\text{ thousand}"],
    "225": ["15^2"],
    "8": ["2^3"],
    "300000": [r"3 \times 10^5"],
    "12!": ["479001600"],
    "2^{10}": ["1024"],
    r"4\cdot 3^5": ["972"],
    "3^{20}": ["3486784401"],
    "2^{2005}": ["2^{2005}"],
    "10": [r"10\%", r"\boxed{10}"],
    r"10\%": ["10"],
    r"\$18.90": ["18.90"],
    "18.90": [r"\$18.9"],
    r"\$5": [r"5\text{ dollars}"],
    r"\pm 3": ["3,-3", "-3, 3"],
    r"1 \pm \sqrt{19}": [r"1+\sqrt{19}, 1-\sqrt{19}"],
    r"\text{(C)}": ["C", "(C)"],
    r"\text{C}": [r"\mathrm{C}"],
    "C": [r"\textbf{(C)}"],
    r"\text{Evelyn}": [r"\text{evelyn}"],
    r"\text{Friday}": ["Friday"],
    r"\text{no solution}": [r"\text{No solution}"],
    r"\text{Yes}": ["yes"],
    r"\text{June 20}": ["June 20"],
    "17": ["17^{th}", r"17^{\text{th}}", r"17^\text{th}"],
    r"\frac{3}{5^{th}}": [r"\frac{3}{5}"],
    "2i": [r"2\sqrt{-1}"],
    r"\emptyset": [r"\varnothing"],
    "11:30": ["11:30"],
    "4:3": ["4:3"],
    r"(-\infty,-4)\cup(-4,\infty)": [r"(-\infty,-4) \cup (-4,\infty)"],
    r"x \in [-2,7]": ["[-2,7]"],
    "[-2,7]": [r"-2 \le x \le 7"],
    "x > 3": [r"(3,\infty)", "3 < x"],
    r"(3,\infty)": ["x > 3"],
    r"x\geq 3": [r"x \ge 3"],
    "(1,2)": ["(1.0,2)", "(1,2)."],
    "-2 < x < 5": ["(-2,5)"],
    r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}": [r"\begin{pmatrix} 1&0\\0&1\end{pmatrix}"],
    r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}": [r"\begin{pmatrix} 0.5 \\ 2 \end{pmatrix}"],
    "x^3+3x-6": ["3x-6+x^3"],
    r"\frac{\sqrt{2}}{2}": [r"\frac{1}{\sqrt{2}}"],
    r"11\sqrt2": [r"11\sqrt{2}"],
    r"\sqrt[3]{2}": ["2^{1/3}"],
    r"\log_2 3": [r"\log_{2}{3}"],
    "p - q": ["-q+p"],
    r"\frac{1}{2}+\frac{i\sqrt{3}}{2}": [r"\frac{1+i\sqrt{3}}{2}"],
    r"\binom{10}{5}": ["252"],
    "f(x)=x^2": ["x^2"],
    r"\left(3,\frac{\pi}{2}\right)": [r"(3,\pi/2)"],
    "(6,31,-1)": ["(6, 31, -1)"],
    r"\frac{3}{56}": [r"\dfrac{3}{56}", r"\tfrac{3}{56}", "3/56"],
    r"\displaystyle\frac{1}{2}": [r"\frac12"],
    r"\infty": [r"\infty", r"+\infty"],
    "0.5": [r"\frac{1}{2}", ".5"],
    r"128\pi": [r"128 \pi"],
    "0": ["-0"],
    "0.00003": [r"3.0 \times 10^{-5}"],
    "5,6": [r"x=5\text{ or }x=6"],
    "0.00001": ["0.000010"],
    "3": ["2+1", r"\approx 3", "3 = 3", r"3\,\text{m}/\text{s}"],
    r"\frac{5}{3}": [r"1\frac{2}{3}", "1 2/3"],
    r"-\frac{5}{3}": [r"-1\frac{2}{3}"],
    "7": [r"\boxed{7}"],
    "100": ["10^{2}"],
    r"\sqrt{3}": [r"\sqrt3"],
    "45": [r"45\text{ sq units}"],
    "2,500,000": [r"2.5\text{ million}"],
    "x": ["x = x"],
    "50": [r"50\%"],
    "11": ["11."],
    "1000": ["1\u00a0000"],
    "1000.5": [r"1\,000.5"],
    "12345": [r"12\,345"],
    "0.12345": [r"0.12\,345"],
    r"\$1,234.56": ["1234.56"],
    r"100,000 - 2,500\pi": [r"100000-2500\pi"],
    "1,000+x": ["x+1000"],
    r"10{,}000\pi": [r"10000\pi"],
    r"\frac{10,000}{7}": [r"\frac{10000}{7}"],
}

LATEX_WRONG = {
    "4210_5": ["4210_6"],
    "1001_2": ["1001_3", "1011_2"],
    "2A_{16}": ["2B_{16}"],
    "5": [
        "12_3", "2+2 = 5", "5.0000001", "\u20135", r"5\text{ million}", r"x=5\text{ or }x=6", "> 5", r"x \ge 5", r"\ne 5",
        r"\text{not } 5", r"5 \text{ is wrong}", r"5 \text{ (wrong)}", r"5 \text{ oder } 6", r"\pm 5",
    ],
    "10101_2": ["10101_{10}"],
    "2": [
        "1 = 2", "0 = 2", r"\frac{1}{2} = 2", r"1 \equiv 2", "1 < 2", r"\{1,2\}", "2;3", r"\text{either 2 or 3}",
        "2 / 3", r"2, \ldots", "1, 2, 3, 4, 5",
    ],
    "3": [
        "1+1=3", r"2 \quad 3", r"2 \\ 3", r"3 \text{ hours and } 20 \text{ minutes}", "2^3", r"3 \times 10^5",
        r"\pm 3", "2+2", r"3 \text{ or more}", "3.0000004", "3 = 4", "4 = 3", r"\text{three}",
    ],
    "7": ["3 = 7"],
    "0": ["1=0", "10^{-9}", "0.0000001"],
    r"\frac{1}{2}": [r"\frac{1}{4} = \frac{1}{2}"],
    "y=2x+3": ["y=2x+4"],
    "x=5": ["y=5"],
    r"\frac{1}{2^{99}}": [r"\frac{1}{2^{98}}"],
    "0.0000672": ["0.0000671"],
    "10^{-9}": [r"2 \cdot 10^{-9}"],
    r"\frac{1}{10^{10}}": ["0"],
    r"\frac{1}{3^{50}}": [r"\frac{1}{3^{51}}"],
    "(0.0000001, 1)": ["(0.0000002, 1)"],
    "0.0000001, 0.0000003": ["0.0000001, 0.0000002"],
    r"1.5 \times 10^{-8}": [r"1.6 \times 10^{-8}"],
    "e^{-30}": ["e^{-31}"],
    r"\frac{\pi}{10^{9}}": [r"\frac{2\pi}{10^{9}}"],
    r"\frac{1}{300}": ["0.0033"],
    r"\frac{1}{3}": ["0.3", "0.33"],
    r"\frac{1}{1000000}": [r"\frac{1}{2000000}"],
    "2^{-40}": ["2^{-41}"],
    "12345678": ["12345679"],
    "1234567.5": ["1234567.6"],
    r"\frac{x}{10^{9}}": [r"\frac{2x}{10^{9}}"],
    "10^{-9} x": [r"2 \cdot 10^{-9} x"],
    r"\frac{1}{\binom{100}{50}}": [r"\frac{1}{\binom{100}{49}}"],
    r"\frac{1}{20!}": [r"\frac{1}{21!}"],
    r"27,000-4500\pi": [r"27-4500\pi", r"22500\pi"],
    "1234": ["1{,}235"],
    "(1,234)": ["1234"],
    "1,234": ["(1,234)"],
    "1,2": ["12"],
    "1, 200": ["1200"],
    "4.2": ["42."],
    r"0.\overline{09}": ["0.09"],
    r"0.\overline{3}": ["0.3"],
    r"0.\overline{12}": [r"0.\overline{21}"],
    r"\overline{AB}": [r"\overline{AC}"],
    r"2 \frac{1}{2}": ["1"],
    r"-2\frac{1}{2}": ["-1.5"],
    r"51\frac{1}{3}": ["17"],
    "1,-2": ["-2"],
    "1,2,3": ["1,2"],
    "3,5,7": ["3,5,9"],
    "1": [r"1 \text{ and } 2"],
    "x=1, y=2": ["x=2,y=1"],
    "225": [r"15\text{ cm}^2"],
    r"12\text{ cm}^3": [r"13 \text{ cm}^3"],
    r"60^\circ": [r"30^\circ"],
    "15": ["15^2"],
    "12!": ["12"],
    "2^{1000}": ["2^{1001}"],
    "10^{100}": ["10^{101}"],
    "2^{2005}": ["2^{2006}"],
    "100!": ["99!"],
    "18.90": ["18.91"],
    r"\pm 3": ["3", "-3", r"\pm 4"],
    r"1 \pm \sqrt{19}": [r"1-\sqrt{19}"],
    r"1\pm 2i": [r"1\pm 3i"],
    r"\text{(C)}": [r"\text{(D)}"],
    r"\text{Evelyn}": [r"\text{Evan}"],
    r"\text{east}": [r"\text{west}"],
    r"\text{June 20}": [r"\text{June 21}"],
    "17": ["17^{t}", "7^{th}"],
    "2i": [r"2\sqrt{-2}", r"\sqrt{-1}"],
    r"\text{even}": [r"\text{odd}"],
    r"\text{ellipse}": [r"\text{circle}"],
    r"\text{two lines}": [r"\text{line}"],
    r"\text{point}": [r"\text{parabola}"],
    r"\emptyset": ["0"],
    r"11:30 \text{ a.m.}": [r"11:30 \text{ p.m.}"],
    "4:3": ["3:4"],
    "2:30": ["2:31"],
    "[2,1)": ["[5,3)"],
    r"[0,\infty)": [r"(0,\infty)"],
    r"x \in [-2,7]": ["(-2,7)"],
    "(2,1)": ["1,2"],
    "x > 3": [r"x \ge 3"],
    "(1,2)": ["(1,3)"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [
        r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}",
    ],
    r"\begin{pmatrix} 0.0000001 \\ 2 \end{pmatrix}": [r"\begin{pmatrix} 0.0000002 \\ 2 \end{pmatrix}"],
    "x^3+3x-6": ["x^3+3x+6"],
    r"\sqrt{2}": ["1.4"],
    r"\sqrt[3]{2}": [r"\sqrt{2}"],
    r"\log_2 3": [r"\log_3 2"],
    r"\tan x": [r"\cot x"],
    "2+3i": ["2-3i"],
    "6+9i": ["6+9j"],
    r"e^{i\pi/3}": [r"e^{i\pi/4}"],
    r"\binom{10}{5}": [r"\binom{10}{4}"],
    r"\text{cis } 40^\circ": [r"\text{cis } 50^\circ"],
    r"\theta": [r"\phi"],
    "n": ["m"],
    "2n-1": ["2n+1"],
    r"\mathbf{v}": [r"\mathbf{w}"],
    "|x|": ["x"],
    r"\lfloor x \rfloor": [r"\lceil x \rceil"],
    "a^2+b^2": ["a^2-b^2"],
    "f(x)=x^2": ["x^3"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"\left( 3, \frac{\pi}{3} \right)"],
    "(6,31,-1)": ["(6,31,1)"],
    r"\frac{3}{56}": [r"\frac{3}{65}"],
    r"\pi": ["3.14", r"\frac{22}{7}"],
    "12": ["12.5"],
    r"128\pi": ["402.12"],
    "128": [r"128\pi"],
    "0.00003": [r"3.0 \times 10^{-6}"],
    "1010_2": [r"1010_{\text{three}}"],
    r"1.23 \times 10^{-7}": [r"1.24 \times 10^{-7}"],
    r"6.02 \times 10^{23}": [r"6.03 \times 10^{23}"],
    "12,500": ["12.5"],
    "12.5": ["12{,}5"],
    r"4\frac{1}{2}": [r"4 \times \frac{1}{2}"],
    "10": ["10^{2}"],
    "2.5": [r"2.5\text{ million}"],
    "1,000": ["1.000"],
    "[1,000)": [""],
}
# {} is a number: what makes something else of it, and what does not
NOT_THE_NUMBER = {
    "an inequality": [
        "> {}", ">{}", "< {}", "≥ {}", "≤{}", "<= {}", ">= {}", r"\ge {}", r"\leq {}", r"\leqslant {}",
        r"\gt {}", "x > {}", r"x \ge {}", "{} > x", "{} < x", "{} ≤ x", "(> {})", "more than {}",
        "less than {}", "fewer than {} eggs", "greater than {}", "above {}", "it exceeds {}", "at least {}",
        "at most {} eggs", "up to {}", "over {}", "under {}", "no more than {}", "{} or more", "{} or less",
        "{} eggs or more", "{} and up", "{}+", "{}+ eggs", "{}+x",
    ],
    "a negation": [
        "not {}", "Not {}", "NOT {}", "**not {}**", "not-{}", "isn't {}", "isn’t {}", "never {}",
        "cannot be {}", "not equal to {}", "not exactly {}", "nicht {}", "¬{}", "!{}", r"\neg {}", r"\not= {}",
        "≠ {}", "x ≠ {}", "x != {}", r"\ne {}", r"x \neq {}", "other than {}", "{} is wrong", "{} (wrong)",
        "{} isn't the answer", "{} is not correct",
    ],
    "an alternative": [
        "{} or 6", "{} oder 6", "{} ou 6", "{} o 6", "{} y 6", "{} und 6", "{} et 6", "{} eller 6", "{} lub 6",
        "{} или 6", "{} 或 6", "{} eggs oder 6 eggs", "entweder {} oder 6", "{} eggs or maybe even 6 eggs",
        "{}, alternatively 6", "{} possibly 6", "{} versus 6", r"{} \lor 6", r"{} \quad 6", "{}...6", "{} … 6",
        "{} through 6", "{} eggs — 6 eggs", "±{}", r"\pm {}", r"{} \pm 6", "{} ± 6",
    ],
}
THE_NUMBER = [
    "=> {}", "-> {}", "--> {}", "→ {}", r"\Rightarrow {}", "2x => {}", ">> {}", "{}>>", "<{}>", "<b>{}</b>",
    "{}</s>", "{}<|eot_id|>", "{} eggs<end_of_turn>", "{} or so", "{} is the answer", "{} is correct",
    "{}, not 6", "{} not 6", "{} rather than 6", "{} instead of 6", "{} dollars, not including tax",
    "Not 6, it is {}", "{} more than Tom", "she needs at least {} trips", "she can buy no more than {} eggs",
    "{} per 6", "{} because 6", "{} incorrect answers",
]
# fmt: on
MATH_ANSWERS = sorted({*LATEX_RIGHT, *LATEX_WRONG})
GRADERS = Path(__file__).resolve().parent.parent / "docs" / "graders.md"


def number_is_right(reference: str, answer: str) -> bool:
    row = tasks.graded_row("gsm8k", {"question": "?", "answer": f"so\n#### {reference}"}, "here")
    return graders.gsm8k_correct([answer], [row])[0]


def latex_is_right(reference: str, answer: str) -> bool:
    row = tasks.graded_row("math", {"problem": "?", "solution": f"It is $\\boxed{{{reference}}}$."}, "here")
    return graders.math_correct([f"so \\boxed{{{answer}}}."], [row])[0]


def disagree(grader, right: dict, wrong: dict) -> list:
    tables = [(right, True), (wrong, False)]
    return [(r, a) for table, verdict in tables for r in table for a in table[r] if grader(r, a) is not verdict]


def test_numbers():
    """Run-ons, arithmetic, fractions, lists, powers, magnitudes, separators, dashes, dots and units."""
    assert disagree(number_is_right, NUMBERS_RIGHT, NUMBERS_WRONG) == []


@pytest.mark.parametrize("number", ["5", "$5", "1,234", "-3", "2.5", "½", "3/4"])
def test_more_than_a_number_is_not_that_number(number):
    """An inequality, a negation and an alternative of a number are other answers, or none; words around it are not."""
    places = "#### {}", "The answer is {}.", r"\boxed{{{}}}"
    right = [place.format(frame.format(number)) for frame in THE_NUMBER for place in places]
    assert [text for text in right if not number_is_right(number, text)] == []
    for kind, frames in NOT_THE_NUMBER.items():
        wrong = [place.format(frame.format(number)) for frame in frames for place in places]
        assert [text for text in wrong if number_is_right(number, text)] == [], kind


def test_latex():
    """What math-verify judges alone, and what is made alike before it or checked after it."""
    assert disagree(latex_is_right, LATEX_RIGHT, LATEX_WRONG) == []


def test_zeros_after_the_decimal_point():
    import sympy

    numbers = {"0.00067": 3, "1/2**99": 29, "1e-5*I": 5, "pi/10**9": 8, "1/factorial(20)": 18, "10**-2000": 1000}
    numbers |= dict.fromkeys(("0", "oo", "x", "3", "1/3", "Interval(0, 1)"), 0)
    assert {text: graders._zeros(sympy.sympify(text)) for text in numbers} == numbers and graders._zeros("text") == 0


def test_every_answer_equals_itself():
    more = [r"\text{(A), (B)}", r"x \in \left\{ 1 \right.", "]a, b[", r"\frac{1", r"\begin{cases} 1 \end{cases}", "?"]
    assert [a for a in MATH_ANSWERS if not latex_is_right(a, a)] == []
    assert [a for a in more if not graders.same_latex(a, a)] == []
    assert not graders.same_latex("", "")


def near_misses(answer: str) -> set[str]:
    """The same answer with another last digit, another sign, or its first part alone."""
    digits = list(re.finditer(r"\d", answer))
    near = {answer[: d.start()] + str((int(d[0]) + 1) % 10) + answer[d.end() :] for d in digits[:1] + digits[-1:]}
    near.add(answer[1:] if answer.startswith("-") else "-" + answer)
    return near - {answer, "-" + answer if set(answer) <= set("0.") or "pm" in answer else answer}


def test_near_misses_are_wrong():
    """Of some four hundred, only units are overlooked."""
    misses = [(a, near) for a in MATH_ANSWERS for near in near_misses(a)]
    assert len(misses) > 350
    passed = [(a, near) for a, near in misses if latex_is_right(a, near)]
    assert all(re.search(r"\\(?:text|mbox)", a) for a, _ in passed) and len(passed) < 8, passed


def test_wrong_answers_that_the_docs_admit():
    """The table of docs/graders.md is what happens."""
    rows = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (right|wrong) \| (right|wrong) \|", GRADERS.read_text(), re.M)
    assert len(rows) >= 8
    for reference, answer, graded, careful in rows:
        assert graded != careful
        assert latex_is_right(reference, answer) == (graded == "right"), (reference, answer)


def test_boxes():
    texts = {
        r"\boxed 10": "10", r"$\boxed 10$.": "10", r"so \boxed10": "10", r"$\boxed -\frac{1}{2}$": r"-\frac{1}{2}",
        r"\fbox{10}": "10", r"$\fbox 10$": "10", r"\boxed {10}": "10", r"\boxed{\{1,2\}}": r"\{1,2\}",
        r"\boxed{\left\{ x \right.}": r"\left\{ x \right.", r"\boxed{\boxed{2}}": "2", r"\boxedtext{3}": None,
        r"\boxed{1} \boxed{2": "1", r"\[\boxed 4\]": "4", "10": None,
    }  # fmt: skip
    assert {text: graders.last_boxed(text) for text in texts} == texts
    run_on = "\\boxed{18}\n\nProblem: What is $3+4$?\n\nSolution: \\boxed{7}"
    assert graders.math_correct([run_on, run_on], [{"answer": "18"}, {"answer": "7"}]) == [True, False]
    assert graders.math_answered(["\\boxed{18}", "18", "\\boxed{18"]) == [True, False, False]


def test_a_text_may_ask_itself_before_its_answer():
    """A question with a number is the next one only behind ####, a box or, in a text that has neither, an answer."""
    doubt = "So the answer is 12.\nBut wait, did I count the 3 boxes in the cellar?\nNo, so there are 12 + 3 = 15.\n"
    for mark in ("#### 15", "The answer is \\boxed{15}."):
        assert graders.extract_number(doubt + mark) == "15"
        again = doubt + mark + "\n\nTom has 3 apples and buys 4 more. How many are there?\n#### 7 \\boxed{7}"
        assert graders.extract_number(again) == "15"
    assert graders.extract_number(doubt + "So it is 15.") == "12"
    assert graders.own_answer(doubt + "\\boxed{15}") == doubt + "\\boxed{15}"


def test_numbers_too_long_to_print_are_no_answer():
    """A policy that repeats itself is wrong; an exception would end its run, and every resumption at the same step."""
    for text in ("The population is 1.5 x 10^6" + " x 10^6" * 800 + ".", "#### " + "7" * 50 + "^99", "7" * 5000):
        assert graders.extract_number(text) is None, text[:20]


def test_time_limit_is_of_the_cpu(monkeypatch):
    """A comparison that waits for the CPU is not cut off; one that uses it without end is, and is wrong."""
    real, before = signal.setitimer, signal.getsignal(signal.SIGVTALRM)
    monkeypatch.setattr(graders.signal, "setitimer", lambda which, seconds: real(which, seconds / 50))
    assert graders.in_time(lambda *given: time.sleep(0.6) or True, "1", "1")
    assert not graders.in_time(lambda *given: sum(iter(lambda: 1, 0)), "1", "1")  # for ever
    monkeypatch.setattr(graders, "same_latex", lambda *given: sum(iter(lambda: 1, 0)))
    assert graders.math_correct(["\\boxed{1}"], [{"answer": "1"}]) == [False]
    assert signal.getsignal(signal.SIGVTALRM) == before
