from tokenyard.divisors import divisors


def test_divisors_ascend_and_are_quick():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(49) == [1, 7, 49]
    assert divisors(10**9)[-1] == 10**9
    assert all(divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 200))
