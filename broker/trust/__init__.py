"""What may leave the machine: what a request holds, whether the policy lets it go, and what is written down of it.

`content` reads a request and finds what is in it, `files` and `secrets` look into its texts, `verdict` asks the rules,
`door` writes the answer onto the job and asks for it at the claim, and `audit` reads the records. Nothing leaves that
has not been through all of them under the rules in force.
"""
