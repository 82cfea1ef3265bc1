# Runs the built-in guest's command, as the leader of a session whose terminal is $1, and ends with its exit status.
#
# Where the leader of a session ends, its terminal is hung up, and what has not gone out is thrown away: this one
# outlives the command and sees that out.

trap : INT TERM
echo $$ >/run/command.new
mv /run/command.new /run/command
sh /etc/hostpart/command
status=$?
stty -F "$1" onlcr 2>/dev/null
until read -r watch </run/watch; do sleep 0.1; done 2>/dev/null
kill -PIPE "$watch"  # of which no shell says a word
exit $status
